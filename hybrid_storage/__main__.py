"""The command ``hybrid-storage``, also as ``python -m hybrid_storage``."""

import sys


def main() -> None:
    """Run the command, or say which extra brings what it needs."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("click", "rich"):
            raise
        sys.stderr.write(
            f"hybrid-storage needs {library}, which the extra brings: "
            'pip install "aiogram-hybrid-storage[cli]"\n'
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="hybrid-storage")


if __name__ == "__main__":
    main()
