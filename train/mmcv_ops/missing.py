"""The error of an operator that is not provided."""


class OperatorNotProvided(NotImplementedError):
    """An operator of mmcv's compiled extension that this package does not have. No recipe needs it."""


def not_provided(operator: str) -> OperatorNotProvided:
    return OperatorNotProvided(
        f"mmcv operator {operator!r} has no substitute here: install onedl-mmcv with its compiled operators to use it"
    )
