"""The tokenizers and the texts that exports are tried with."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

from pretrain.data.bpe import train_bpe
from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.tokenizer_files import portable_files, write_files
from tests.support.tokenizers_like import write_gpt2, write_llama3, write_neox, write_qwen

# llama.cpp's names for the rules that cut text into words; ours is a SentencePiece, which has none.
PRE_TOKENIZERS = {"own": None, "gpt2": "gpt-2", "neox": "olmo", "llama3": "llama-bpe", "qwen": "qwen2"}

SCRIPTS = [
    "The quick brown fox jumps over the lazy dog.",
    "L’été, où l’on déjeunait à l’ombre: «ça va?»",
    "Straße, Äpfel und Öl für 3,50 €",
    "Zażółć gęślą jaźń",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "זה כיף סתם לשמוע איך תנצח קרפד",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "いろはにほへと ちりぬるを",
    "漢字かな交じり文を書く。",
    "天地玄黃，宇宙洪荒。",
    "다람쥐 헌 쳇바퀴에 타고파",
    "Đây là một câu tiếng Việt có dấu",
    "ქართული ანბანი",
    "Հայերեն այբուբեն",
    "ภาษาไทย ๑๒๓ និង ភាសាខ្មែរ",
    "e\u0301 and é, ﬁ and fi, Ａ and A, № ½",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋",
]
SYMBOLS = [
    "👩‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
    "😀😀😀 text 😶‍🌫️text",
    "a\u200bb\u200db\ufeffc",
    "I'm, you're, he'll, they've, WE'D, it'S, 'tis",
    "1 12 123 1234 12345 3.14 1,000,000 0x1F 1e-5",
    "http://a.b/c?d=e&f=g#h user@host.example",
    "snake_case camelCase kebab-case CONSTANT_CASE",
    "!!! ??? ... --- === *** ``` ''' \"\"\" <<>> {}[]()",
    "def f(x):\n    return x**2\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5, null, true], "text": "\\n"}',
    "x=1;y=2;\r\nz=3;\r\n\r\n",
    "ends with a space ",
    " begins with a space",
    "▁ is a character ▁▁ too",
    "\x00\x01\x7f control",
]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
]


def texts() -> list[str]:
    """Return about a hundred texts: scripts, symbols, runs of white space, and words that look like special tokens."""
    runs = [
        f"a{space * count}b" for space in (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000") for count in (1, 2, 3, 4, 8)
    ]
    edges = [space * count for space in (" ", "\n", "\t") for count in (1, 2, 5)]
    mixed = ["a \n b", "a\n \n b", "  \n\n  a", "a\t \tb", " a  b   c    d", "\n a\n  b\n   c", "a \n\n\n \n"]
    marked = [text for token in SPECIAL for text in (token, f"a{token}b", f"a {token} b")]
    return [*SCRIPTS, *SYMBOLS, *runs, *edges, *mixed, *marked]


def write_tokenizer(shape: str, folder: Path, documents: list[str]) -> None:
    """Write a tokenizer of a shape in PRE_TOKENIZERS, trained on `documents`, printable characters and some of SCRIPTS."""
    _WRITERS[shape](folder, [*documents, string.printable, *SCRIPTS[:3]])


def _own(folder: Path, documents: list[str]) -> None:
    """Write the tokenizer of tools/train_tokenizer.py."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(train_bpe(documents, 420))
    write_files(portable_files(load_tokenizer(folder / "tokenizer.model"), folder), folder)


_WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "own": _own,
    "gpt2": write_gpt2,
    "neox": write_neox,
    "llama3": write_llama3,
    "qwen": write_qwen,
}
