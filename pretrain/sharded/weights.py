"""Arithmetic on the weights of a running engine, done where the pieces live: nothing is gathered, both copies agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from pretrain.model.layout import Weight, describe_model
from pretrain.sharded.collectives import all_gather, check_call, require_known
from pretrain.sharded.draws import CHUNK, Draw, fill_slice_
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
from pretrain.sharded.row_means import add_column_sums_, columns, subtract_from_rows_


class ShardedWeights:
    """The weights of a DeepSpeed engine, whatever its ZeRO stage, precision, offloading and tensor parallelism.

    Every method but `pieces` and `snapshot` is collective: call it on all ranks, with the same arguments, between
    optimizer steps. These raise the same error on every rank: ValueError for an unknown weight, a factor that float32
    does not hold, or arguments that differ between ranks, and RuntimeError for a call in the middle of gradient
    accumulation.

    Attributes:
        engine: the engine.
        placement: the place of its weights' pieces on this rank.
        layout: each weight by name, in the order of the module.
    """

    def __init__(self, engine: Engine) -> None:
        """Bind to an engine.

        Args:
            engine: an initialized engine.

        Raises:
            UserError: where the engine's optimizer keeps its weights in a way that is not supported.
        """
        self.engine = engine
        self.placement = placement_of(engine)
        self.layout: dict[str, Weight] = {weight.name: weight for weight in describe_model(engine.module)}

    def moments(self, names: Iterable[str] | None = None) -> dict[str, Moments]:
        """Return count, mean and centred squares of full weights, taken in float64. Collective.

        Costs one pass over the rank's own shard, and one all-gather of three numbers per weight for the whole list. The
        partial results are gathered and merged rather than summed, because sums of squares cancel (see moments.py).

        Args:
            names: the weights to measure, every weight by default.

        Returns:
            The moments of each weight by its name, the same on every rank. A weight that holds NaN or infinity has a
            standard deviation of NaN. The others are not affected.

        Raises:
            RuntimeError: between the micro-batches of a step.
            ValueError: for an unknown name, or where the ranks ask for different weights.
        """
        rows = self._merged("moments", partial_moments, names)
        return {name: Moments(int(count), *rest) for name, (count, *rest) in rows.items()}

    def statistics(self, names: Iterable[str] | None = None) -> dict[str, Statistics]:
        """Return the moments of full weights with statistics of their tails: kurtosis and absolute maximum. Collective.

        Costs twice the time of `moments`, and six numbers per weight.

        Args:
            names: the weights to measure, every weight by default.

        Returns:
            The statistics of each weight by its name, the same on every rank.

        Raises:
            RuntimeError: between the micro-batches of a step.
            ValueError: for an unknown name, or where the ranks ask for different weights.
        """
        rows = self._merged("statistics", partial_statistics, names)
        return {name: Statistics(int(count), *rest) for name, (count, *rest) in rows.items()}

    @torch.no_grad()
    def rescale_(self, changes: Mapping[str, tuple[float, float]]) -> None:
        """Replace each named weight W by scale * W + shift in every copy. Collective.

        Computes in float32. After the check of the call, ranks communicate only to refresh half-precision working copies.
        The optimizer's moments stay as they are. The caller must make sure that the values fit the working precision:
        fp16 ends at 65,504.

        Args:
            changes: (scale, shift) of each weight to change, by its name. May be empty.

        Raises:
            RuntimeError: between the micro-batches of a step.
            ValueError: for an unknown name, a factor that float32 does not hold, or changes that differ between ranks.
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
        """Subtract from each row of each named matrix the mean over all its rows, in every copy. Collective.

        From a vector its mean is subtracted. The means are summed in float64, in one all-reduce of a number per column
        for the whole list, and subtracted in float32. Half-precision working copies are refreshed as by `rescale_`.

        Args:
            names: the weights to change. May be empty.

        Raises:
            RuntimeError: between the micro-batches of a step.
            ValueError: for an unknown name, or where the ranks name different weights.
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
    def fill_(self, seed: int, rule: Callable[[Weight], Draw], names: Iterable[str] | None = None) -> None:
        """Give weights their initial values in every copy. Collective.

        Draws by position (see draws.py): the same bits for every world size, stage and tensor-parallel size.

        Args:
            seed: the seed of the run.
            rule: maps a weight to the distribution that it is drawn from.
            names: the weights, every weight by default.

        Raises:
            RuntimeError: between the micro-batches of a step.
            ValueError: for an unknown name, or where seed or distributions differ between ranks.
        """
        wanted = list(self.layout if names is None else names)
        draws = self._draws(rule, wanted)
        chosen = check_call(self.engine, self.layout, "fill_", wanted, extra=(seed, sorted(draws.items())))
        for piece in self.placement.edit(chosen):
            fill_slice_(piece.master, draws[piece.name], seed, piece.name, piece.slice, piece.start)
        self.placement.refresh(chosen)

    @torch.no_grad()
    def perturb_(self, seed: int, shrink: float, noise: Callable[[Weight], Draw], names: Iterable[str]) -> None:
        """Replace each named weight W by shrink W + N in every copy, with N drawn by position. Collective.

        The draws have streams of their own: they do not depend on `fill_` with the same seed.

        Args:
            seed: the seed of the run.
            shrink: the factor.
            noise: maps a weight to the distribution of N.
            names: the weights to change.

        Raises:
            RuntimeError: between the micro-batches of a step.
            ValueError: for an unknown name, or where the arguments differ between ranks.
        """
        wanted = list(names)
        draws = self._draws(noise, wanted)
        extra = (seed, shrink, sorted(draws.items()))
        chosen = check_call(self.engine, self.layout, "perturb_", wanted, extra=extra)
        for piece in self.placement.edit(chosen):
            start = piece.start
            for chunk in piece.master.split(CHUNK):
                added = torch.empty(len(chunk))
                fill_slice_(added, draws[piece.name], seed, f"perturbation of {piece.name}", piece.slice, start)
                chunk.mul_(shrink).add_(added.to(chunk.device))
                start += len(chunk)
        self.placement.refresh(chosen)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copy what this rank counts of each weight, for a later `squared_change`. Local.

        Returns:
            (counted elements,) float32 of each weight by its name, on the device of its master.
        """
        return {piece.name: piece.counted.clone() for piece in self.pieces()}

    def squared_change(self, before: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the squared Frobenius distance of full weights from a snapshot, taken in float64. Collective.

        Args:
            before: what `snapshot` returned, or a part of it, of the same weights on every rank.

        Returns:
            The squared distance of each weight in `before` by its name, the same on every rank.

        Raises:
            RuntimeError: between the micro-batches of a step.
            ValueError: for an unknown name, or where the ranks ask for different weights.
        """
        chosen = check_call(self.engine, self.layout, "squared_change", before)
        if not chosen:
            return {}
        pieces = self.placement.pieces(chosen)
        mine = {piece.name: squared_distance(piece.counted, before[piece.name]) for piece in pieces}
        sums = all_gather(torch.stack(list(mine.values()))).sum(0)
        return dict(zip(mine, sums.tolist(), strict=True))

    def pieces(self, names: Iterable[str] | None = None) -> Iterator[Piece]:
        """Return an iterator over this rank's pieces of weights, for reading. Local.

        A piece is valid until the next one is asked for.

        Args:
            names: the weights, every weight by default.

        Raises:
            ValueError: for an unknown name.
        """
        wanted = set(self.layout if names is None else names)
        require_known(wanted, self.layout)
        return self.placement.pieces(wanted)

    def _draws(self, rule: Callable[[Weight], Draw], names: Iterable[str]) -> dict[str, Draw]:
        """Return the distribution of each named weight. Unknown names are left to `check_call`, which all ranks hear."""
        return {name: rule(self.layout[name]) for name in names if name in self.layout}

    def _mean_rows(self, names: set[str]) -> dict[str, torch.Tensor]:
        """Return the mean over all rows of each named weight: (columns,) float64 on the engine's device. Collective."""
        shapes = {name: weight.shape for name, weight in self.layout.items() if name in names}
        widths = [columns(shape) for shape in shapes.values()]
        sums = torch.zeros(sum(widths), dtype=torch.float64, device=self.engine.device)
        sums_of = dict(zip(shapes, sums.split(widths), strict=True))
        for piece in self.placement.pieces(names):
            mine = torch.zeros(len(sums_of[piece.name]), dtype=torch.float64, device=piece.counted.device)
            add_column_sums_(mine, piece)
            sums_of[piece.name] += mine.to(sums.device)
        dist.all_reduce(sums)
        return {name: column_sums / shapes[name][0] for name, column_sums in sums_of.items()}

    def _merged(
        self, operation: str, partial: Callable[[Iterable[torch.Tensor]], torch.Tensor], names: Iterable[str] | None
    ) -> dict[str, list[float]]:
        """Return the rows that `partial` makes of the ranks' pieces, merged over all ranks, by name. Collective."""
        chosen = check_call(self.engine, self.layout, operation, self.layout if names is None else names)
        if not chosen:
            return {}
        in_order: list[str] = []

        def counted() -> Iterator[torch.Tensor]:
            for piece in self.placement.pieces(chosen):
                in_order.append(piece.name)
                yield piece.counted

        rows = merge(all_gather(partial(counted())))
        return dict(zip(in_order, rows.tolist(), strict=True))


def _rescale_(flat: torch.Tensor, scale: float, shift: float) -> None:
    """Replace w by scale * w + shift, chunk by chunk, so that both operations take one pass over memory."""
    for chunk in chunks(flat):
        chunk.mul_(scale).add_(shift)
