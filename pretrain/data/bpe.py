"""SentencePiece BPE: training, and conversion into the Hugging Face tokenizer that gives the same ids.

A SentencePiece BPE merges, at each step, the adjacent pair whose joined piece comes first in the vocabulary. A list of
all such pairs in that order makes the `tokenizers` library do the same, so no SentencePiece is needed after training.
"""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from pretrain.errors import UserError, first_line

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"  # SentencePiece writes this for a space inside a piece
_WRITES_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}  # as tokenizer.json has it
WORDS = f"\n|{SPACE}+[^{SPACE}\n]*|[^{SPACE}\n]+"
MAX_LINE_BYTES = 16384  # SentencePiece drops longer sentences, so they are cut first
_RESERVED = "\u2585"  # SentencePiece writes this for the unknown, and drops sentences that hold it

# Text on which two tokenizers that differ in how they treat spaces, digits, case or Unicode give different ids.
PROBE = (
    "  Two  spaces,\n\n\ttabs\r\n and I'm 12,345.67% sure: naïve café № ½ ﬁ Ａ e\u0301 Ünïcödé, 漢字かな, עברית, 👩‍🚀. "
    "def f(x):\n        return x**2  # CamelCase snake_case <|x|> http://a.b/c?d=e"
)


def train_bpe(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE of exactly `vocab_size` pieces: unk, bos, eos, 256 bytes, then the learnt ones.

    Text keeps its exact form: no normalisation, no added space, runs of spaces kept, unknown characters as bytes.
    Newlines are never inside a piece, digits stand alone. The same documents give the same bytes. What `documents`
    raises is raised here.

    Returns:
        The serialised model.

    Raises:
        UserError: The documents hold no text, or too little for the vocabulary.
    """
    return _interruptibly(lambda sentences: _train(sentences, vocab_size), _lines(documents))


def _train(sentences: _Kept, vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=MAX_LINE_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if sentences.error is not None:  # SentencePiece raises another error in its place
            raise sentences.error from None
        if not sentences.taken:
            raise UserError("the source holds no text, so there is nothing to learn a vocabulary from.") from error
        raise UserError(
            f"SentencePiece cannot make a vocabulary of {vocab_size} from this text: {first_line(error)}. A vocabulary holds 259 "
            "fixed tokens, the characters of the text and its merges; choose another --vocab-size or give more text."
        ) from error
    return model.getvalue()


class _Kept:
    """An iterable whose error is kept, and which can be ended from another thread."""

    def __init__(self, items: Iterable[str]) -> None:
        self._items = items
        self.taken = 0
        self.error: BaseException | None = None
        self.is_ended = False

    def __iter__(self) -> Iterator[str]:
        try:
            for item in self._items:
                if self.is_ended:
                    raise KeyboardInterrupt
                self.taken += 1
                yield item
        except BaseException as error:
            self.error = error
            raise


def _interruptibly(train: Callable[[_Kept], bytes], sentences: Iterable[str]) -> bytes:
    """Run `train` in a thread: SentencePiece works for minutes without a check for interrupts."""
    kept = _Kept(sentences)
    results: list[bytes] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(train(kept))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        kept.is_ended = True  # this ends it while it still takes text; later it ends with this process
        thread.join(1.0)
        raise
    if errors:
        raise errors[0]
    return results[0]


def tokenizer_from_sentencepiece(model_file: Path) -> PreTrainedTokenizerFast:
    """Return the Hugging Face form of a SentencePiece BPE, proved on a probe text to give the same ids.

    Raises:
        UserError: `model_file` is no SentencePiece BPE, or uses options that the conversion does not reproduce.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        model = ModelProto.FromString(model_file.read_bytes())
    except Exception as error:  # protobuf's DecodeError derives from Exception alone
        raise UserError(f"'{model_file}' is not a SentencePiece model: {error}.") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError(
            f"'{model_file}' is not a BPE model, and only SentencePiece BPE can be converted here. Convert it with "
            "transformers and give the folder that `save_pretrained` wrote."
        )
    tokenizer = to_hugging_face(model)
    _check_equal_ids(processor, model, tokenizer, model_file)
    return tokenizer


def to_hugging_face(model: ModelProto) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer with the ids, special tokens and spacing of `model`."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = _backend(model)
    kinds = model.SentencePiece
    for piece in model.pieces:
        if piece.type in (kinds.UNKNOWN, kinds.CONTROL):
            backend.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == kinds.USER_DEFINED:
            backend.add_tokens([AddedToken(piece.piece, special=False, normalized=False)])
    spec = model.trainer_spec
    names = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    special = {name: model.pieces[token_id].piece for name, token_id in names.items() if token_id >= 0}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def to_sentencepiece(tokenizer: Mapping[str, Any]) -> bytes | None:
    """Return `tokenizer`, the content of a tokenizer.json, as a serialised SentencePiece BPE; None where it cannot be one.

    The reverse of `to_hugging_face`: the larger a piece's id, the lower its score. The caller checks that the ids are the
    same.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

    bpe, normalizer, cut = tokenizer["model"], tokenizer["normalizer"] or {}, tokenizer["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    pieces = sorted(bpe.get("vocab", {}), key=bpe.get("vocab", {}).get)
    unknown = bpe.get("unk_token") or "<unk>"  # transformers' class for Llama 2 names none
    if not bpe.get("byte_fallback") or unknown not in pieces:
        return None
    if _WRITES_SPACES not in steps and cut.get("type") != "Metaspace":
        return None
    added = {token["content"]: token["special"] for token in tokenizer["added_tokens"]}
    model = ModelProto()
    kinds = model.SentencePiece
    for token_id, piece in enumerate(pieces):
        kind = kinds.NORMAL
        if piece == unknown:
            kind, model.trainer_spec.unk_id = kinds.UNKNOWN, token_id
        elif piece in added:
            kind = kinds.CONTROL if added[piece] else kinds.USER_DEFINED
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        model.pieces.add(piece=piece, score=-token_id if kind == kinds.NORMAL else 0, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = spec.BPE, True, len(pieces)
    spec.bos_id = spec.eos_id = spec.pad_id = -1  # tokenizer_config.json names them
    rules = model.normalizer_spec
    rules.name, rules.remove_extra_whitespaces = "identity", False
    rules.add_dummy_prefix = any(step.get("type") == "Prepend" for step in steps) or (
        cut.get("prepend_scheme", "never") != "never"
    )
    return model.SerializeToString()


def _backend(model: ModelProto) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    bpe = models.BPE(
        vocabulary, _merges(model), unk_token=unknown, byte_fallback=model.trainer_spec.byte_fallback, fuse_unk=True
    )
    backend = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    if _pieces_end_where_spaces_begin(model):
        backend.pre_tokenizer = _words()
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _merges(model: ModelProto) -> list[tuple[str, str]]:
    """Return every split of every learnt piece into two learnt pieces, best piece first."""
    learnt = {piece.piece: piece.score for piece in model.pieces if piece.type == model.SentencePiece.NORMAL}
    best_first = sorted(learnt, key=lambda piece: learnt[piece], reverse=True)
    return [
        (piece[:cut], piece[cut:])
        for piece in best_first
        for cut in range(1, len(piece))
        if piece[:cut] in learnt and piece[cut:] in learnt
    ]


def _pieces_end_where_spaces_begin(model: ModelProto) -> bool:
    """Return whether no learnt piece extends from a word into a space or across a newline, so that words encode apart."""
    learnt = (piece.piece for piece in model.pieces if piece.type == model.SentencePiece.NORMAL)
    return all(SPACE not in piece.lstrip(SPACE) and (piece == "\n" or "\n" not in piece) for piece in learnt)


def _words() -> PreTokenizer:
    """Return a cut into newlines and words with the spaces before them: short strings encode faster and can be cached."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(WORDS), "isolated")


def _check_equal_ids(
    processor: sentencepiece.SentencePieceProcessor,
    model: ModelProto,
    tokenizer: PreTrainedTokenizerFast,
    model_file: Path,
) -> None:
    user_defined = [piece.piece for piece in model.pieces if piece.type == model.SentencePiece.USER_DEFINED]
    text = " word ".join([PROBE, *user_defined, PROBE])
    if tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] != processor.encode(text):
        raise UserError(
            f"'{model_file}' uses SentencePiece options (normalisation, say) that the conversion here does not "
            "reproduce. Convert it with transformers and give the folder that `save_pretrained` wrote."
        )


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the documents in a form that SentencePiece never drops."""
    cut = 0
    for document in documents:
        for line in document.split("\n"):
            pieces = [piece for part in line.split(_RESERVED) for piece in _short_enough(part)]
            cut += len(pieces) > 1
            yield from filter(None, pieces)
    if cut:
        print(
            f"cut {cut:,} lines that SentencePiece would drop into shorter ones: they have more than {MAX_LINE_BYTES:,} "
            f"bytes, or the character {_RESERVED} in them",
            file=sys.stderr,
            flush=True,
        )


def _short_enough(line: str) -> Iterator[str]:
    """Yield `line`, in pieces if it has more than MAX_LINE_BYTES; cut before spaces where there are any."""
    longest = MAX_LINE_BYTES // 4  # in characters, which have four bytes at most
    if len(line) <= longest or len(line.encode()) <= MAX_LINE_BYTES:
        longest = len(line)
    start = 0
    while len(line) - start > longest:
        stop = line.rfind(" ", start + 1, start + longest)
        stop = stop if stop > 0 else start + longest
        yield line[start:stop]
        start = stop
    yield line[start:]
