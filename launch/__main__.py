"""``python -m launch``: the ``align`` command, where its script is not on the path."""

import os
import signal


def main() -> None:
    """Run the command; Ctrl-C ends it without a stack trace even while it is being imported."""
    # pydantic would look for plugins in the metadata of every package that is installed.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launch.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
