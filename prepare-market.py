"""Prepare Market-1501 for training and evaluation: `python prepare-market.py --data_root ../Market`."""

from data.prepare import main
from utils import run_cli

if __name__ == "__main__":
    run_cli(lambda: main(dataset="market1501"))
