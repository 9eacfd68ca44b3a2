"""``python -m launch``: the ``align`` command, where its script is not on the path."""

import signal


def main() -> None:
    """Run the command; Ctrl-C ends it without a stack trace even while it is being imported."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launch.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
