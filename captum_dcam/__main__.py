"""``python -m captum_dcam``: the command line."""

from captum_dcam.cli.app import main

if __name__ == "__main__":
    main()
