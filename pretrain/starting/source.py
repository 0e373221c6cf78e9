"""The model that a run starts from: where it lies, its configuration, and its weights, found without reading them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pretrain.checkpoints.folders import resolve
from pretrain.checkpoints.manifest import MANIFEST
from pretrain.checkpoints.stored import StoredTensor, is_universal, master_weights, safetensors_weights
from pretrain.config.model_section import hf_class
from pretrain.config.schema import Config, load_config
from pretrain.data.json_files import read_json
from pretrain.errors import UserError, first_line
from pretrain.starting.hub import HUB, fetched


@dataclass(frozen=True)
class Source:
    """A model to start from.

    Attributes:
        name: what run files call it: a path, or a model of the hub with its revision.
        folder: the folder with its configuration and its tokenizer.
        checkpoint: the checkpoint of a run; None for a Hugging Face folder.
        missing: why it is not there any more, as a sentence. None where it is.
    """

    name: str
    folder: Path
    checkpoint: Path | None = None
    missing: str | None = None

    def weights(self) -> dict[str, StoredTensor]:
        """Return its tensors by name: the weights of a Hugging Face folder, or the fp32 masters of a checkpoint.

        Raises:
            UserError: there are none, or they are damaged.
        """
        if self.missing is not None:
            raise UserError(self.missing)
        if self.checkpoint is not None:
            return master_weights(self.checkpoint / "deepspeed")
        folder = fetched(self.name, weights=True)[0] if self.name.startswith(HUB) else self.folder
        return safetensors_weights(folder)

    def run(self) -> Config | None:
        """Return the configuration of the run that wrote the checkpoint, None without a checkpoint."""
        return None if self.checkpoint is None else load_config(self.checkpoint / "config.yaml")

    def model_config(self, family: str) -> PreTrainedConfig:
        """Return its Hugging Face configuration.

        Args:
            family: the family of the run.

        Raises:
            UserError: it is of another family, or cannot be read.
        """
        path = self.folder / "config.json"
        content = read_json(path)
        run = self.run()
        theirs = run.model.family if run else content.get("model_type")
        if theirs != family:
            raise UserError(
                f"model.init_from: {path} is of a {theirs}, and model.family is {family}.{_own_class(theirs)}"
            )
        declared = {field.name for field in dataclasses.fields(hf_class(family))} | _OLDER_FIELDS
        try:
            # A method may have made it another class, with more fields. The family's own are the plain model's.
            return hf_class(family).from_dict({key: value for key, value in content.items() if key in declared})
        except Exception as error:  # transformers raises many kinds here
            raise UserError(f"model.init_from: {path} is not a valid {family}: {first_line(error)}.") from error


_OLDER_FIELDS = {"rope_theta", "rope_scaling"}


def source_of(path: str) -> Source:
    """Return the model that `model.init_from` names. A model of the hub is fetched without its weights.

    Raises:
        UserError: there is none.
    """
    if path.startswith(HUB):
        folder, name = fetched(path, weights=False)
        return Source(name, folder)
    place = Path(path)
    if (place.name == "latest" and place.is_file()) or (place / MANIFEST).is_file():
        checkpoint = resolve(place)
        return Source(str(checkpoint), checkpoint / "hf", checkpoint)  # `latest` will be another one
    if (place / "config.json").is_file():
        return Source(path, place)
    raise UserError(f"model.init_from: {place} {_fault_of(place)}")


def _fault_of(place: Path) -> str:
    if not place.exists():
        return "does not exist. Give a Hugging Face folder, a checkpoint, or hf://owner/name for a model of the hub."
    if (place / "checkpoints/latest").is_file():
        return f"is a run folder. Give one of its checkpoints, such as {place / 'checkpoints/latest'}."
    if is_universal(place):
        return (
            "is a DeepSpeed universal checkpoint, which does not say what model it is of. Resume from it "
            "(checkpoint.resume), or convert its model to a Hugging Face folder."
        )
    return "is neither a Hugging Face folder (there is no config.json) nor a checkpoint (there is no manifest.json)."


def _own_class(family: Any) -> str:
    if family != "evenkeel_llama":
        return ""
    return " It was exported from a run whose methods no stock class has: start from that run's checkpoint instead."
