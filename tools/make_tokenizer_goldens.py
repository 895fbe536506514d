"""Write the goldens of test_chat_template.py and test_tokenizer.py.

    python tools/make_tokenizer_goldens.py        # needs transformers, tokenizers, sentencepiece

tests/data/chat_goldens.json: conversations rendered and encoded by transformers.
tests/data/spm_{plain,normalised}.model: small sentencepiece BPE models.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny_tokenizer import CHAT_TEMPLATE, SPECIALS, TEXT, tokenizer_json  # noqa: E402

TEMPLATES = {
    "capitalised": CHAT_TEMPLATE,
    "headers": """{{- bos_token }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\\n" }}
    {%- endfor %}
    {{- tools | tojson(indent=4) }}
{%- endif %}
{%- for message in messages %}
    {{- '<' + message.role + '>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>\\n\\n' }}
{%- endif %}
""",
    "blocks": """{% for message in messages %}
    {% if message['role'] == 'user' %}
[USER] {{ message['content'] }}
    {% elif message['role'] == 'assistant' %}
[BOT] {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}

    {% endif %}
{% endfor %}
""",
    "loops": """{% set ns = namespace(turn=0) %}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% set ns.turn = ns.turn + 1 %}
{{ ns.turn }}. {{ message.content }}{% if loop.last %} (last){% endif %}
{% if ns.turn == 3 %}{% break %}{% endif %}
{% endfor %}
{{ style | default('plain') }}""",
    "documents": """{% for d in documents %}{{ d.title }}: {{ d.text }}
{% endfor %}{% for m in messages %}{{ m['content'] }}{% if m.note is defined %}!{% endif %}
{% endfor %}{% if not add_generation_prompt is defined %}?{% endif %}""",
}
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "  hello there \n"}]},
    {
        "messages": [
            {"role": "system", "content": 'be <brief> & "kind"'},
            {"role": "user", "content": "why is the sky blue? 🙂"},
            {"role": "assistant", "content": "because …"},
            {"role": "user", "content": "no,\n\nreally?"},
            {"role": "assistant", "content": "yes"},
        ],
        "add_generation_prompt": True,
    },
    {
        "messages": [{"role": "user", "content": "look it up", "note": None}],
        "tools": [{"type": "function", "function": {"name": "find", "about": "naïve <b>"}}],
        "add_generation_prompt": True,
    },
    {
        "messages": [{"role": "user", "content": "summarise"}],
        "documents": [{"title": "A", "text": "first"}, {"title": "B", "text": "second"}],
        "style": "formal",
    },
]


def chat_goldens() -> None:
    import transformers
    from tokenizers import Tokenizer

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer_json(320))),
        bos_token=SPECIALS[0],
        eos_token=SPECIALS[1],
    )
    cases = []
    for name, template in TEMPLATES.items():
        for conversation in CONVERSATIONS:
            if name == "documents" and "documents" not in conversation:
                continue
            options = {"chat_template": template, **conversation}
            messages = options.pop("messages")
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"]
            cases.append({"name": name, **conversation, "text": text, "ids": ids})
    golden = {
        "transformers": transformers.__version__,
        "vocab_size": 320,
        "templates": TEMPLATES,
        "cases": cases,
    }
    path = ROOT / "tests/data/chat_goldens.json"
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


def sentencepiece_models() -> None:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("\n".join([TEXT, *TEXT.split(" in "), "naïve café ﬁne"]) + "\n")
        rules = Path(folder, "rules.tsv")
        rules.write_text("FB01\t66 69\n")  # the ligature fi
        for name, rule in (("plain", ""), ("normalised", str(rules))):
            sentencepiece.SentencePieceTrainer.train(
                input=str(text),
                model_prefix=str(Path(folder, name)),
                model_type="bpe",
                vocab_size=360,
                byte_fallback=True,
                normalization_rule_name="" if rule else "identity",
                normalization_rule_tsv=rule,
                remove_extra_whitespaces=bool(rule),
                user_defined_symbols=["<sep>"],
                hard_vocab_limit=False,
                num_threads=1,
                minloglevel=2,
            )
            model = Path(folder, f"{name}.model").read_bytes()
            (ROOT / f"tests/data/spm_{name}.model").write_bytes(model)


if __name__ == "__main__":
    chat_goldens()
    sentencepiece_models()
