"""What ends the help text of every verb."""


def examples(*commands: str) -> str:
    """The end of a verb's help; the tests run each line that starts with a dollar sign."""
    return "\n\n".join(["[bold]Example[/bold]", *(f"$ hybridzoo {command}" for command in commands)])
