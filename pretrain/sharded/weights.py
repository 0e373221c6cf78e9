"""Arithmetic on the weights of a running engine, done where the pieces live: no gather, both copies always agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from pretrain.layout import Weight, describe_model
from pretrain.sharded.fill import fill_normal_
from pretrain.sharded.guard import all_gather, check_call
from pretrain.sharded.moments import Moments, merge, partial_moments
from pretrain.sharded.pieces import Piece, placement_of


class ShardedWeights:
    """The weights of a DeepSpeed engine, whatever its ZeRO stage and precision.

    Every method is collective: call it on all ranks, with the same arguments, between optimizer steps. Whatever is
    wrong with a call is raised on every rank: an unknown weight, a factor that is not finite, ranks that pass
    different arguments (ValueError), a call in the middle of gradient accumulation (RuntimeError).
    """

    def __init__(self, engine) -> None:
        """Raises UserError where the engine's optimizer keeps its weights in a way that is not supported."""
        self.engine = engine
        self.placement = placement_of(engine)
        self.layout: dict[str, Weight] = {weight.name: weight for weight in describe_model(engine.module)}

    def moments(self, names: Iterable[str] | None = None) -> dict[str, Moments]:
        """Count, mean and centred squares of each full weight (of all weights by default), in float64.

        One pass over the rank's own shard and one all-gather of three numbers per weight for the whole list. The
        partial results are gathered and merged rather than summed, because sums of squares cancel (see moments.py).
        """
        chosen = check_call(self.engine, self.layout, self.layout if names is None else names)
        pieces = self.pieces(chosen)
        partial = torch.stack([partial_moments(piece.master) for piece in pieces])
        full = partial if self.placement.replicated else merge(all_gather(partial))
        rows = zip(pieces, full.tolist(), strict=True)
        return {piece.name: Moments(int(count), mean, squares) for piece, (count, mean, squares) in rows}

    @torch.no_grad()
    def rescale_(self, changes: Mapping[str, tuple[float, float]]) -> None:
        """Replace each named weight W by scale * W + shift in both copies; `changes` maps name -> (scale, shift).

        Local except for the refresh of the working copies. Optimizer moments are left alone.
        """
        chosen = check_call(self.engine, self.layout, changes, changes)
        if not chosen:
            return
        for piece in self.pieces(chosen):
            scale, shift = changes[piece.name]
            piece.master.mul_(scale).add_(shift)
        self.placement.refresh(chosen)

    @torch.no_grad()
    def fill_(self, seed: int, rule: Callable[[Weight], tuple[float, float]]) -> None:
        """Give every weight its initial values; `rule` maps a weight to (mean, standard deviation).

        Drawn by position (see fill.py): the same bits for every world size and stage. A deviation of 0 fills with the
        constant mean.
        """
        for piece in self.pieces(self.layout):
            mean, std = rule(self.layout[piece.name])
            if std == 0.0:
                piece.master.fill_(mean)
            else:
                fill_normal_(piece.master, seed, piece.name, piece.start, std)
                piece.master.add_(mean)
        self.placement.refresh(self.layout.keys())

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of this rank's pieces, to measure how far the weights move until `squared_change`."""
        return {piece.name: piece.master.clone() for piece in self.pieces(self.layout)}

    def squared_change(self, before: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Squared Frobenius distance of each full weight from the snapshot `before`, in float64."""
        pieces = self.pieces(check_call(self.engine, self.layout, before))
        sums = torch.stack([(piece.master.double() - before[piece.name]).square().sum() for piece in pieces])
        if not self.placement.replicated:
            sums = all_gather(sums).sum(0)
        return dict(zip((piece.name for piece in pieces), sums.tolist(), strict=True))

    def pieces(self, names: Iterable[str]) -> list[Piece]:
        """This rank's pieces of the named weights. Looked up at each call: DeepSpeed may move its buffers."""
        wanted = set(names)
        return [piece for piece in self.placement.pieces() if piece.name in wanted]
