"""Prepare a data set for training and evaluation: `python prepare.py --dataset msmt17 --data_root ../MSMT17`."""

from data.prepare import main
from utils import run_cli

if __name__ == "__main__":
    run_cli(main)
