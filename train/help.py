"""Examples at the end of every verb's help."""


def examples(*commands: str) -> str:
    """Example lines for a verb's help; the tests run each line that starts with a dollar sign."""
    return "\n\n".join(["[bold]Example[/bold]", *(f"$ hybridzoo {command}" for command in commands)])
