"""Start the command line of the benchmarks: `python -m benchmarks tvr`, in the repository."""

from pretrain.cli.start import start

if __name__ == "__main__":
    start("benchmarks.command_line")
