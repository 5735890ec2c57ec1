"""Errors a person can act on."""


class UserError(Exception):
    """Bad input: the message is one line that names the argument, the value and what to do instead.

    The command line prints it and exits with code 2; everything else is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught UserError in "):  # a worker of PyTorch's loader: its traceback ends in the line
            message = message.strip().rpartition("UserError: ")[2]
        super().__init__(message)


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM); its exit status is 143, as a shell has it.

    Args:
        message: one line for the person, which the command line prints.
    """

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message
