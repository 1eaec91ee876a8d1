"""Record tiny SAE files as the libraries write them, and what the libraries compute from them.

Each part runs once, in an environment with its library; the tests read only what is written:

    pip install torch sae-lens==6.54.12            python tests/oracles/record_sae_files.py saelens
    pip install --no-deps sae-lens==5.10.7 (above) python tests/oracles/record_sae_files.py saelens_before_6
    pip install torch eai-sparsify==1.3.3          python tests/oracles/record_sae_files.py sparsify
    pip install torch dictionary-learning==0.1.0   python tests/oracles/record_sae_files.py dictionary_learning
    pip install numpy safetensors                  python tests/oracles/record_sae_files.py gemma_scope

Gemma Scope has no library; its part computes the published formula with numpy. Its arrays have the published names
and layouts and random values.

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "sae_files"
D_IN, N_LATENTS, D_OUT, N_ROWS = 6, 10, 5, 12


def inputs(seed: int = 0, width: int = D_IN) -> np.ndarray:
    """Activations, [N_ROWS, width], with a mean and of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N_ROWS, width)) * np.linspace(0.5, 3, N_ROWS)[:, None] + 0.5
    return x.astype(np.float32)


def save(folder: Path, **arrays: Any) -> None:
    """Write activations beside the files of an SAE."""
    made = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
    np.savez_compressed(folder / "activations.npz", allow_pickle=False, **made)


def randomise(module: Any, seed: int) -> None:
    """Give the parameters of a torch module random values; thresholds and scales stay above 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.5
        parameter.data = values.abs() if "threshold" in name or "scaling_factor" in name else values


def record_saelens() -> None:
    """Every architecture of SAELens 6 that has an equal here, and checkpoints of training."""
    import sae_lens.saes as saes
    import torch

    about = {"model_name": "gpt2-small", "hook_name": "blocks.5.hook_resid_post", "context_size": 128}
    common: dict[str, Any] = {"d_in": D_IN, "d_sae": N_LATENTS}
    to = {**common, "d_out": D_OUT, "apply_b_dec_to_input": False}
    out = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    heads = {"hook_name": "blocks.5.attn.hook_z"}
    pursuit = {"max_iterations": 3, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "standard": ("StandardSAE", common, {}),
        "standard_uncentred": ("StandardSAE", {**common, "apply_b_dec_to_input": False}, {}),
        "standard_layer_norm": ("StandardSAE", {**common, "normalize_activations": "layer_norm"}, {}),
        "standard_constant_norm": ("StandardSAE", {**common, "normalize_activations": "constant_norm_rescale"}, {}),
        "standard_heads": ("StandardSAE", {**common, "reshape_activations": "hook_z"}, heads),
        "gated": ("GatedSAE", common, {}),
        "topk": ("TopKSAE", {**common, "k": 3}, {}),
        "topk_rescaled": ("TopKSAE", {**common, "k": 3, "rescale_acts_by_decoder_norm": True}, {}),
        "jumprelu": ("JumpReLUSAE", common, {}),
        "jumprelu_uncentred": ("JumpReLUSAE", {**common, "apply_b_dec_to_input": False}, {}),
        "matching_pursuit": ("MatchingPursuitSAE", {**common, **pursuit}, {}),
        "transcoder": ("Transcoder", to, out),
        "transcoder_layer_norm": ("Transcoder", {**to, "normalize_activations": "layer_norm"}, out),
        "skip_transcoder": ("SkipTranscoder", to, out),
        "jumprelu_transcoder": ("JumpReLUTranscoder", to, out),
        "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", to, out),
    }
    for i, (case, (name, options, more)) in enumerate(cases.items()):
        config = getattr(saes, f"{name}Config")(**options, metadata=saes.sae.SAEMetadata(**about | more))
        sae = getattr(saes, name)(config)
        randomise(sae, i)
        if case == "matching_pursuit":
            sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
        _record_saelens(sae, case, is_heads=case == "standard_heads")

    for i, (case, name, options) in enumerate(
        [
            ("batchtopk", "BatchTopKTrainingSAE", {}),
            ("matryoshka", "MatryoshkaBatchTopKTrainingSAE", {"matryoshka_widths": [2, 5, N_LATENTS]}),
        ]
    ):
        sae = getattr(saes, name)(getattr(saes, f"{name}Config")(**common, **options, k=3))
        randomise(sae, 50 + i)
        sae.topk_threshold = torch.tensor(0.4, dtype=torch.double)
        folder = HERE / "saelens" / f"{case}_checkpoint"
        sae.save_model(folder)
        sae.save_inference_model(HERE / "saelens" / f"{case}_trained")
        # After training its function is that of the JumpReLU SAE; latents of the checkpoint are the same.
        trained = saes.SAE.load_from_disk(HERE / "saelens" / f"{case}_trained")
        for other in (folder, HERE / "saelens" / f"{case}_trained"):
            x = torch.tensor(inputs())
            with torch.no_grad():
                save(other, x=x, latents=trained.encode(x), reconstruction=trained(x))


def _record_saelens(sae: Any, case: str, *, is_heads: bool, folder: str = "saelens") -> None:
    import torch

    path = HERE / folder / case
    sae.save_model(path)
    x = torch.tensor(inputs())
    given = x.reshape(N_ROWS, 2, D_IN // 2) if is_heads else x
    with torch.no_grad():
        latents = sae.encode(given)
        reconstruction = sae(given).reshape(N_ROWS, -1)
    save(path, x=x, latents=latents, reconstruction=reconstruction)


def record_saelens_before_6() -> None:
    """Files of SAELens 5: a flat configuration, TopK as an activation function, the factors of fine-tuning."""
    from sae_lens.sae import SAE, SAEConfig

    about: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": N_LATENTS,
        "context_size": 128,
        "model_name": "gpt2-small",
        "hook_name": "blocks.5.hook_resid_pre",
        "hook_layer": 5,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "some/text",
        "dataset_trust_remote_code": True,
        "normalize_activations": "none",
        "dtype": "float32",
        "device": "cpu",
        "sae_lens_training_version": "5.10.7",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "architecture": "standard",
        "activation_fn_str": "relu",
    }
    cases = {
        "standard": {},
        "finetuned": {"finetuning_scaling_factor": True},
        "topk": {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        "gated": {"architecture": "gated", "normalize_activations": "layer_norm"},
        "jumprelu": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
        "heads": {"hook_name": "blocks.5.attn.hook_z"},
    }
    for i, (case, changes) in enumerate(cases.items()):
        sae = SAE(SAEConfig(**about | changes))
        randomise(sae, 100 + i)
        _record_saelens(sae, case, is_heads=case == "heads", folder="saelens_before_6")


def record_sparsify() -> None:
    """TopK autoencoders and transcoders of sparsify."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    cases = {
        "layers.5": SparseCoderConfig(num_latents=N_LATENTS, k=3),
        "layers.3.mlp": SparseCoderConfig(num_latents=N_LATENTS, k=3, transcode=True),
        "layers.4.mlp": SparseCoderConfig(expansion_factor=2, k=3, transcode=True, skip_connection=True),
        "layers.6": SparseCoderConfig(num_latents=N_LATENTS, k=5, activation="groupmax"),
    }
    folder = HERE / "sparsify"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m", "dataset": "some/text"}))
    for i, (case, config) in enumerate(cases.items()):
        coder = SparseCoder(D_IN, config)
        randomise(coder, 200 + i)
        coder.save_to_disk(folder / case)
        x = torch.tensor(inputs())
        with torch.no_grad():
            values, indices, _ = coder.encode(x)
            latents = torch.zeros(N_ROWS, coder.num_latents).scatter(-1, indices, values)
            reconstruction = coder(x).sae_out
        save(folder / case, x=x, latents=latents, reconstruction=reconstruction)


def record_dictionary_learning() -> None:
    """Every class of dictionary_learning, saved as its training loop does."""
    import torch
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    groups = [2, 3, 5]
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "AutoEncoder": (dictionary.AutoEncoder(D_IN, N_LATENTS), {}),
        "AutoEncoderNew": (dictionary.AutoEncoderNew(D_IN, N_LATENTS), {}),
        "GatedAutoEncoder": (dictionary.GatedAutoEncoder(D_IN, N_LATENTS), {}),
        "JumpReluAutoEncoder": (dictionary.JumpReluAutoEncoder(D_IN, N_LATENTS), {}),
        "AutoEncoderTopK": (top_k.AutoEncoderTopK(D_IN, N_LATENTS, 3), {"k": 3}),
        "BatchTopKSAE": (batch_top_k.BatchTopKSAE(D_IN, N_LATENTS, 3), {"k": 3}),
        "BatchTopKSAE_new": (batch_top_k.BatchTopKSAE(D_IN, N_LATENTS, 3), {"k": 3}),
        "MatryoshkaBatchTopKSAE": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D_IN, N_LATENTS, 3, groups),
            {"k": 3, "group_sizes": groups},
        ),
    }
    for i, (case, (module, more)) in enumerate(cases.items()):
        randomise(module, 300 + i)
        if hasattr(module, "threshold") and module.threshold.ndim == 0 and not case.endswith("_new"):
            module.threshold.fill_(0.3)
        folder = HERE / "dictionary_learning" / case
        folder.mkdir(parents=True, exist_ok=True)
        trainer = {
            "dict_class": type(module).__name__,
            "trainer_class": "Trainer",
            "activation_dim": D_IN,
            "dict_size": N_LATENTS,
            "lr": 1e-3,
            "steps": 10,
            "layer": 8,
            "lm_name": "EleutherAI/pythia-70m",
            "wandb_name": "name",
            "submodule_name": "resid_post_layer_8",
            **more,
        }
        buffer = {"d_submodule": D_IN, "io": "out", "n_ctxs": 10, "ctx_len": 128, "device": "cpu"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}, indent=4))
        # As its training loop does: the state dict on the CPU.
        torch.save({k: v.cpu() for k, v in module.state_dict().items()}, folder / "ae.pt")
        x = torch.tensor(inputs())
        with torch.no_grad():
            save(folder, x=x, latents=module.encode(x), reconstruction=module(x))
    _record_pickles(torch)


def _record_pickles(torch: Any) -> None:
    """Other files torch writes: dtypes, views into one storage, modules' own dicts, and what is to be refused."""
    folder = HERE / "torch"
    folder.mkdir(parents=True, exist_ok=True)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "float32": base,
        "transposed": base.T,
        "part": base[1:3, 2:5],
        "float64": base.double() / 3,
        "float16": base.half(),
        "bfloat16": base.bfloat16() / 3,
        "int64": torch.tensor([2, -3]),
        "int32": torch.tensor(7, dtype=torch.int32),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
    }
    torch.save(tensors, folder / "tensors.pt")
    torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "state_dict.pt")
    torch.save(torch.nn.Linear(3, 2), folder / "module.pt")
    torch.save({"x": base}, folder / "before_1_6.pt", _use_new_zipfile_serialization=False)
    torch.save({"x": torch.zeros(1).expand(1000)}, folder / "expanded.pt")
    known = {name: value.detach().float().numpy() for name, value in tensors.items()}
    np.savez_compressed(folder / "tensors.npz", allow_pickle=False, **known)


def record_gemma_scope() -> None:
    """The layouts of both releases of Gemma Scope."""
    from safetensors.numpy import save_file

    def arrays(seed: int, d_out: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        shapes = {"W_enc": (D_IN, N_LATENTS), "b_enc": (N_LATENTS,), "W_dec": (N_LATENTS, d_out), "b_dec": (d_out,)}
        made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        return {**made, "threshold": rng.uniform(0.1, 1, N_LATENTS).astype(np.float32)}

    def activations(p: dict[str, np.ndarray], x: np.ndarray, skip: np.ndarray | float = 0.0) -> dict[str, np.ndarray]:
        p = {name: values.astype(np.float64) for name, values in p.items()}
        pre = x.astype(np.float64) @ p["W_enc"] + p["b_enc"]
        latents = np.where(pre > p["threshold"], np.maximum(pre, 0), 0)
        return {"x": x, "latents": latents, "reconstruction": latents @ p["W_dec"] + p["b_dec"] + skip}

    first = {
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71": D_IN,
        "gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_7": D_IN,
        "gemma-scope-2b-pt-transcoders/layer_4/width_16k/average_l0_7": D_OUT,
    }
    for i, (path, d_out) in enumerate(first.items()):
        folder = HERE / "gemma_scope" / path
        folder.mkdir(parents=True, exist_ok=True)
        made = arrays(400 + i, d_out)
        np.savez(folder / "params.npz", allow_pickle=False, **made)
        save(folder, **activations(made, inputs()))
    folder = HERE / "gemma_scope" / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True, exist_ok=True)
    made = arrays(450, D_IN)
    np.savez(folder / "params.npz", allow_pickle=False, **{n.replace("W_", "w_"): v for n, v in made.items()})
    # Trained before Gemma multiplies embeddings by sqrt(d_in); the site is after it.
    inner = activations(made, (inputs() / np.sqrt(D_IN)).astype(np.float32))
    save(folder, x=inputs(), latents=inner["latents"], reconstruction=inner["reconstruction"] * np.sqrt(D_IN))
    second = {
        "resid_post/layer_9_width_16k_l0_small": (D_IN, False),
        "transcoder_all/layer_9_width_16k_l0_small_affine": (D_OUT, True),
    }
    for i, (path, (d_out, has_skip)) in enumerate(second.items()):
        folder = HERE / "gemma_scope" / "gemma-scope-2-270m-pt" / path
        folder.mkdir(parents=True, exist_ok=True)
        made, x = arrays(460 + i, d_out), inputs()
        files = {name.replace("W_", "w_"): values for name, values in made.items()}
        config: dict[str, Any] = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}
        skip: Any = 0.0
        if has_skip:
            files["affine_skip_connection"] = np.random.default_rng(i).standard_normal((D_IN, d_out)).astype(np.float32)
            config["affine_connection"] = True
            skip = x @ files["affine_skip_connection"]
        save_file(files, folder / "params.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        save(folder, **activations(made, x, skip))


def main() -> None:
    """Record the part that the command line names."""
    globals()[f"record_{sys.argv[1]}"]()


if __name__ == "__main__":
    main()
