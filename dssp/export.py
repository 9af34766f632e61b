"""`python -m dssp.export`: write the network that a retraining left in its run folder for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dssp.command import run_command
from dssp.config import ExportConfig, parse_export
from dssp.derived.exporting import export_network
from dssp.derived.trained import NAME, load_trained
from dssp.options import ConfigError
from dssp.runs.files import write_atomically


def run(config: ExportConfig, console: Console) -> Path:
    """The whole command: the file is checked first, then written; returns where it is."""
    out = Path(config.out)
    trained = load_trained(Path(config.run_dir) / NAME)
    content, difference = export_network(trained, config.format)
    try:
        write_atomically(out, lambda file: file.write(content))
    except OSError as error:
        raise ConfigError("out", f"{out}: {error.strerror}") from None
    channels, height, width = trained.image_shape
    console.print(
        f"{out}: {len(content) / 2**20:.1f} MiB, takes float32 [batch, {channels}, {height}, {width}]; "
        f"largest difference of a logit to the network {difference:.1e}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(run, parse_export(argv))


if __name__ == "__main__":
    main()
