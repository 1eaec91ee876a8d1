"""Record what SAELens makes of the SAEs that are exported for it.

Run once, the first part in this project's environment, the second in one with SAELens; the tests read only the file
that comes out:

    PYTHONPATH=. python tests/oracles/record_saelens_reads_export.py write FOLDER
    python tests/oracles/record_saelens_reads_export.py read FOLDER       # pip install torch sae-lens==6.54.12

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def write(folder: Path) -> None:
    """Export every case of the tests to `folder`, with what we compute from it."""
    from interp_jax.methods.sae.files import export_saelens
    from tests.methods.sae import test_files_export as cases

    for case in cases.CASES:
        sae, x = cases.exported(case), cases.inputs()
        export_saelens(sae, folder / case)
        latents = np.asarray(sae.encode(x)) * np.float32(cases.scale_of_latents(sae))
        made = {"x": x, "latents": latents, "reconstruction": np.asarray(sae(x))}
        np.savez(folder / f"{case}.npz", allow_pickle=False, **made)
    (folder / "cases.json").write_text(json.dumps(list(cases.CASES)))


def read(folder: Path) -> None:
    """Load the exports in `folder` with SAELens and write how far its activations are from ours."""
    import sae_lens
    import torch

    found: dict[str, Any] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        config = json.loads((folder / case / "cfg.json").read_text())
        sae = sae_lens.SAE.load_from_disk(folder / case)
        with np.load(folder / f"{case}.npz") as ours, torch.no_grad():
            x = torch.tensor(ours["x"])
            if config["reshape_activations"] == "hook_z":
                x = x.reshape(len(x), 2, -1)
            theirs = {"latents": sae.encode(x).numpy(), "reconstruction": sae(x).reshape(len(x), -1).numpy()}
            distances = {
                name: float(np.abs(values - ours[name]).max() / np.abs(ours[name]).max())
                for name, values in theirs.items()
            }
        arrays = {name: list(value.shape) for name, value in sae.state_dict().items()}
        found[case] = {**distances, "config": config, "arrays": dict(sorted(arrays.items()))}
        print(case, distances)
    record = {"sae_lens": sae_lens.__version__, "cases": found}
    (HERE / "saelens_reads_export.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
