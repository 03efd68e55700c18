"""Prepare Market-1501 for training and evaluation: `python prepare-market.py --data_root ../Market`."""

from data import prepare
from utils import run_cli


def main() -> int:
    return prepare.main(dataset="market1501")


if __name__ == "__main__":
    run_cli(main)
