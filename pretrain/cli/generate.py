"""Continue a prompt with an exported model, by transformers.

python tools/generate.py --model hf/tiny_tvr --prompt "def read(path):"
"""

from __future__ import annotations

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.errors import UserError


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--model", type=argument_types.path, required=True, help="a folder that tools/convert_to_hf.py wrote"
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=argument_types.whole(1), default=48)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise UserError(f"{arguments.model} holds no config.json. Make it with tools/convert_to_hf.py.")

    from transformers import pipeline

    import pretrain.model.evenkeel_llama  # noqa: F401  (a model that no stock class holds loads without running a file of its folder)

    generate = pipeline("text-generation", model=str(arguments.model), trust_remote_code=False)
    result = generate(arguments.prompt, max_new_tokens=arguments.max_new_tokens, max_length=None, do_sample=False)
    print(result[0]["generated_text"])
