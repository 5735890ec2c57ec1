"""What an operator that is not provided says."""


class OperatorNotProvided(NotImplementedError):
    """An operator of mmcv's compiled extension that no recipe needs, and that this package does not have."""


def not_provided(operator: str) -> OperatorNotProvided:
    return OperatorNotProvided(
        f"mmcv operator {operator!r} has no substitute here: install onedl-mmcv with its compiled operators to use it"
    )
