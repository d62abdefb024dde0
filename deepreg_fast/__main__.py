"""`python -m deepreg_fast`: the command `deepreg-fast`, for launchers that start modules, such as torchrun."""

from .cli import main

if __name__ == "__main__":
    main()
