"""The command line of ows_lightning: ``python main.py fit --config configs/quickstart.yaml``."""

from ows_lightning.cli.main import main

if __name__ == "__main__":
    main()
