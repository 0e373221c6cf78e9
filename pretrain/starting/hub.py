"""Models of the Hugging Face hub: fetched into the hub's cache, and named by the revision that they were fetched at."""

from __future__ import annotations

from pathlib import Path

from pretrain.errors import UserError, first_line

HUB = "hf://"
_DESCRIPTION = ["config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def fetched(name: str, *, weights: bool) -> tuple[Path, str]:
    """Return the folder of a model in the hub's cache, and its name with the revision.

    Ranks of a node may call it at once: the cache locks each file, so it is fetched once.

    Args:
        name: hf://owner/name, with @revision or without.
        weights: fetch the weights too, and not only what describes the model.

    Raises:
        UserError: there is no such model, or it can neither be fetched nor is it in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    wanted = [*_DESCRIPTION, *(_WEIGHTS if weights else [])]
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises dozens of kinds
        raise UserError(
            f"model.init_from: cannot fetch {name}: {type(error).__name__}: {first_line(error)} Check the name on "
            "huggingface.co, the network, and `hf auth login` for a gated model."
        ) from error
    return folder, f"{HUB}{repository}@{folder.name}"  # the cache names the folder by the revision
