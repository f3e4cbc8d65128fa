"""What the tests of the original Qwen share: its published pattern, a text to train a few merges on, its rank file."""

import base64

#: As published in tokenization_qwen.py.
PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
TEXT = (
    "通义千问是阿里云研发的大语言模型。大语言模型的参数规模很大,模型的规模越大,语言能力越强。\n"
    "The model's weights aren't many; they're the weights of a small model, and we'll add other weights to the model.\n"
    "def add(first, second):\n    return first + second\n\n\nfor index in range(10):\n    print(index, add(index, 1))\n"
    "🚀🚀🚀 🎉🎉 2023年 café naïve aaaaaaaaaa -------- ======== \t\t  \r\n\r\n"
)


def write_ranks(file, ranks):
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    file.write_text("\n".join(lines) + "\n")
