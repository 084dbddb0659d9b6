"""SAELens' configurations from before version 6, brought to the form of version 6.

They are flat, and mean other things where a field is absent: b_dec is subtracted from the input,
and hook_z is reshaped. SAELens takes any file without a version of 6 or more for one of these.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_runner.errors import StoreError

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
           "hook_point_layer": "hook_layer", "activation_fn_str": "activation_fn"}  # fmt: skip
# Fields that decide what an SAE computes.
OWN = frozenset({
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input",
    "normalize_activations", "reshape_activations", "finetuning_scaling_factor", "activation_fn",
    "activation_fn_kwargs", "metadata",
})  # fmt: skip
# Fields that say where it reads, kept.
METADATA = frozenset({
    "model_name", "hook_name", "hook_layer", "hook_head_index", "model_class_name", "prepend_bos",
    "model_from_pretrained_kwargs", "exclude_special_tokens", "neuronpedia_id", "context_size",
    "seqpos_slice", "dataset_path", "dataset_trust_remote_code", "sae_lens_version",
    "sae_lens_training_version", "sequence_separator_token", "disable_concat_sequences",
})  # fmt: skip
# Fields of a training run, which early versions wrote beside them: nothing of a trained SAE.
TRAINING = frozenset({
    "act_store_device", "activation_dim", "adam_beta1", "adam_beta2", "autocast", "autocast_lm",
    "b_dec_init_method", "cached_activations_path", "checkpoint_path", "checkpoint_path_prefix",
    "compile_llm", "compile_sae", "d_out", "dead_feature_estimation_method",
    "dead_feature_threshold", "dead_feature_window", "decoder_heuristic_init",
    "decoder_heuristic_init_norm", "decoder_orthogonal_init", "eval_batch_size_prompts",
    "eval_every_n_wandb_logs", "evaluate_every", "expansion_factor", "feature_reinit_scale",
    "feature_resampling_method", "feature_sampling_method", "feature_sampling_window",
    "finetuning_method", "finetuning_tokens", "from_pretrained_path", "ghost_grads",
    "init_encoder_as_decoder_transpose", "is_dataset_tokenized", "jumprelu_bandwidth",
    "jumprelu_init_threshold", "l1_coefficient", "l1_loss_wd_norm", "l1_warm_up_steps",
    "llm_compilation_mode", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb",
    "log_to_wandb", "lp_norm", "lr", "lr_decay_steps", "lr_end", "lr_scheduler_name",
    "lr_warm_up_steps", "model_kwargs", "mse_loss_normalization", "n_batches_in_buffer",
    "n_batches_to_use", "n_checkpoints", "n_eval_batches", "n_restart_cycles",
    "new_cached_activations_path", "noise_factor", "normalize_sae_decoder", "resample_batches",
    "resume", "run_name", "sae_compilation_mode", "sae_lens_training_version",
    "scale_sparsity_penalty_by_decoder_norm", "seed", "store_batch_size",
    "store_batch_size_prompts", "streaming", "tokens_per_buffer", "total_training_steps",
    "total_training_tokens", "train_batch_size", "train_batch_size_tokens", "training_tokens",
    "use_cached_activations", "use_ghost_grads", "verbose", "wandb_entity", "wandb_id",
    "wandb_log_frequency", "wandb_project",
})  # fmt: skip
KNOWN = frozenset({*OWN, *METADATA, *TRAINING, *RENAMED})


def modernised(old: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The configuration as version 6 writes it; `finetuning_scaling_factor` stays.

    Raises:
        StoreError: an activation function that no SAE of version 6 has.
    """
    cfg = {RENAMED.get(key, key): value for key, value in old.items()}
    architecture, activation = cfg.get("architecture", "standard"), cfg.get("activation_fn", "relu")
    kwargs = dict(cfg.get("activation_fn_kwargs") or {})
    new: dict[str, Any] = {key: cfg[key] for key in ("d_in", "d_sae") if key in cfg}
    if activation in ("topk", "topk_relu"):
        architecture, new["k"] = "topk", kwargs.pop("k", None)
    elif activation != "relu":
        raise StoreError(f"{path}: activation_fn={activation!r}: only relu and topk are known")
    if kwargs:
        raise StoreError(f"{path}: activation_fn_kwargs has {sorted(kwargs)[0]!r}: unknown here")
    normalised = cfg.get("normalize_activations") or "none"
    hook = str(cfg.get("hook_name") or "")
    return {
        **new,
        "architecture": architecture,
        "dtype": cfg.get("dtype", "float32"),
        "device": cfg.get("device", "cpu"),
        "apply_b_dec_to_input": cfg.get("apply_b_dec_to_input", True),
        "normalize_activations": "expected_average_only_in" if normalised is True else normalised,
        "reshape_activations": cfg.get(
            "reshape_activations", "hook_z" if "hook_z" in hook else "none"
        ),
        "finetuning_scaling_factor": cfg.get("finetuning_scaling_factor", False),
        "metadata": {
            **dict(cfg.get("metadata") or {}),
            **{key: value for key, value in cfg.items() if key in METADATA},
        },
    }
