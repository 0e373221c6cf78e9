"""Names of an engine's weights, and which ranks hold the same elements of one."""

from __future__ import annotations

import torch

from pretrain.sharded.piece import Piece, Slice, make_piece, tensor_slice


class Owner:
    """What every placement knows of its engine: its optimizer, the names of its weights, its tensor-parallel ranks."""

    def __init__(self, engine) -> None:
        """Raises UserError for a weight that tensor parallelism cuts in a way that is not supported."""
        self.optimizer = engine.optimizer
        self.names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.slices: dict[str, Slice] = {name: tensor_slice(p, name) for name, p in engine.module.named_parameters()}
        self.tensor_ranks, self.tensor_rank = 1, 0
        if engine.autotp_size() > 1:
            from deepspeed.utils import groups

            self.tensor_ranks = groups.get_tensor_model_parallel_world_size()
            self.tensor_rank = groups.get_tensor_model_parallel_rank()

    def name(self, parameter: torch.nn.Parameter) -> str:
        return self.names[id(parameter)]

    def piece(self, name: str, start: int, master: torch.Tensor, replicas: int = 1, replica: int = 0) -> Piece:
        """The piece of `name` whose elements `replicas` data-parallel ranks hold alike, this being the `replica`-th."""
        part = self.slices[name]
        if part.dim is None:
            replicas, replica = replicas * self.tensor_ranks, replica * self.tensor_ranks + self.tensor_rank
        return make_piece(name, part, start, master, replicas, replica)
