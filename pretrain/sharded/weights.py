"""Arithmetic on the weights of a running engine, done where the pieces live: no gather, both copies always agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from pretrain.model.layout import Weight, describe_model
from pretrain.sharded.collectives import all_gather, check_call, require_known
from pretrain.sharded.columns import add_column_sums_, columns, subtract_from_rows_
from pretrain.sharded.draws import Draw, fill_slice_
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.moments import (
    Moments,
    Statistics,
    chunks,
    merge,
    partial_moments,
    partial_statistics,
    squared_distance,
)
from pretrain.sharded.piece import Piece
from pretrain.sharded.placement import placement_of


class ShardedWeights:
    """The weights of a DeepSpeed engine, whatever its ZeRO stage, precision, offloading and tensor parallelism.

    Every method is collective: call it on all ranks, with the same arguments, between optimizer steps. Whatever is
    wrong with a call is raised on every rank: an unknown weight, a factor that is not finite, ranks that pass
    different arguments (ValueError), a call in the middle of gradient accumulation (RuntimeError).
    """

    def __init__(self, engine: Engine) -> None:
        """Raises UserError where the engine's optimizer keeps its weights in a way that is not supported."""
        self.engine = engine
        self.placement = placement_of(engine)
        self.layout: dict[str, Weight] = {weight.name: weight for weight in describe_model(engine.module)}

    def moments(self, names: Iterable[str] | None = None) -> dict[str, Moments]:
        """Count, mean and centred squares of each full weight (of all weights by default), in float64.

        One pass over the rank's own shard and one all-gather of three numbers per weight for the whole list. The
        partial results are gathered and merged rather than summed, because sums of squares cancel (see moments.py).
        A weight that holds NaN or infinity has a deviation of NaN; the others are not touched by it.
        """
        rows = self._merged("moments", partial_moments, names)
        return {name: Moments(int(count), *rest) for name, (count, *rest) in rows.items()}

    def statistics(self, names: Iterable[str] | None = None) -> dict[str, Statistics]:
        """As `moments`, and the tails: kurtosis and absolute maximum. Twice the time, and six numbers per weight."""
        rows = self._merged("statistics", partial_statistics, names)
        return {name: Statistics(int(count), *rest) for name, (count, *rest) in rows.items()}

    @torch.no_grad()
    def rescale_(self, changes: Mapping[str, tuple[float, float]]) -> None:
        """Replace each named weight W by scale * W + shift in every copy; `changes` maps name -> (scale, shift).

        Computed in float32. Local except for the refresh of half-precision working copies. Optimizer moments are left
        alone. The caller sees to it that the values fit the working precision: fp16 ends at 65,504.
        """
        chosen = check_call(self.engine, self.layout, "rescale_", changes, changes)
        if not chosen:
            return
        stale = set(chosen)
        for piece in self.placement.edit(chosen):
            _rescale_(piece.master, *changes[piece.name])
            if (copy := self.placement.exact_copy(piece.name)) is not None:
                _rescale_(copy.view(-1), *changes[piece.name])  # the same bits, and no communication
                stale.remove(piece.name)
        self.placement.refresh(stale)

    @torch.no_grad()
    def center_rows_(self, names: Iterable[str]) -> None:
        """Subtract from each row of each named matrix the mean over all its rows, in every copy; from a vector its mean.

        The means are summed in float64, in one all-reduce of a number per column for the whole list; they are subtracted
        in float32. The refresh of half-precision working copies comes on top, as for `rescale_`.
        """
        chosen = check_call(self.engine, self.layout, "center_rows_", names)
        if not chosen:
            return
        means, stale = self._mean_rows(chosen), set(chosen)
        for piece in self.placement.edit(chosen):
            subtract_from_rows_(piece.master, piece.start, piece, means[piece.name])
            if (copy := self.placement.exact_copy(piece.name)) is not None:
                subtract_from_rows_(copy.view(-1), 0, piece, means[piece.name])  # the same bits
                stale.remove(piece.name)
        self.placement.refresh(stale)

    @torch.no_grad()
    def fill_(self, seed: int, rule: Callable[[Weight], Draw]) -> None:
        """Give every weight its initial values; `rule` maps a weight to the distribution that it is drawn from.

        Drawn by position (see draws.py): the same bits for every world size, stage and tensor-parallel size.
        """
        draws = {name: rule(weight) for name, weight in self.layout.items()}
        chosen = check_call(self.engine, self.layout, "fill_", self.layout, also=(seed, sorted(draws.items())))
        for piece in self.placement.edit(chosen):
            fill_slice_(piece.master, draws[piece.name], seed, piece.name, piece.slice, piece.start)
        self.placement.refresh(chosen)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of what this rank counts of each weight, to measure how far it moves until `squared_change`."""
        return {piece.name: piece.counted.clone() for piece in self.pieces()}

    def squared_change(self, before: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Squared Frobenius distance of each full weight from the snapshot `before`, in float64."""
        chosen = check_call(self.engine, self.layout, "squared_change", before)
        if not chosen:
            return {}
        pieces = self.placement.pieces(chosen)
        mine = {piece.name: squared_distance(piece.counted, before[piece.name]) for piece in pieces}
        sums = all_gather(torch.stack(list(mine.values()))).sum(0)
        return dict(zip(mine, sums.tolist(), strict=True))

    def pieces(self, names: Iterable[str] | None = None) -> Iterator[Piece]:
        """This rank's pieces of the named weights (of all by default), to be read; each holds until the next one.

        Not collective. Raises ValueError for an unknown weight.
        """
        wanted = set(self.layout if names is None else names)
        require_known(wanted, self.layout)
        return self.placement.pieces(wanted)

    def _mean_rows(self, names: set[str]) -> dict[str, torch.Tensor]:
        """The mean over all rows of each named weight, (columns,) float64."""
        shapes = {name: weight.shape for name, weight in self.layout.items() if name in names}
        widths = [columns(shape) for shape in shapes.values()]
        sums = torch.zeros(sum(widths), dtype=torch.float64, device=self.engine.device)
        of_weight = dict(zip(shapes, sums.split(widths), strict=True))
        for piece in self.placement.pieces(names):
            mine = torch.zeros(len(of_weight[piece.name]), dtype=torch.float64, device=piece.counted.device)
            add_column_sums_(mine, piece)
            of_weight[piece.name] += mine.to(sums.device)
        dist.all_reduce(sums)
        return {name: sums_of_one / shapes[name][0] for name, sums_of_one in of_weight.items()}

    def _merged(
        self, what: str, partial: Callable[[Iterable[torch.Tensor]], torch.Tensor], names: Iterable[str] | None
    ) -> dict[str, list[float]]:
        """What `partial` finds in this rank's pieces, merged over all ranks, by name."""
        chosen = check_call(self.engine, self.layout, what, self.layout if names is None else names)
        if not chosen:
            return {}
        found: list[str] = []

        def counted() -> Iterator[torch.Tensor]:
            for piece in self.placement.pieces(chosen):
                found.append(piece.name)
                yield piece.counted

        rows = merge(all_gather(partial(counted())))
        return dict(zip(found, rows.tolist(), strict=True))


def _rescale_(flat: torch.Tensor, scale: float, shift: float) -> None:
    """Chunk by chunk, so that memory is passed over once for both operations."""
    for chunk in chunks(flat):
        chunk.mul_(scale).add_(shift)
