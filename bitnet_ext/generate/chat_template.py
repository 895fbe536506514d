"""Chat templates: jinja2 programs that come with a checkpoint, run in a sandbox.

They see the environment and the variables that the transformers library gives them, so that a
template renders to the same text. A template is untrusted: it sees plain data only.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from bitnet_ext.errors import CheckpointError, InvalidShapeError

__all__ = ["ChatTemplates"]

MAX_TEMPLATE_CHARS = 1 << 20


class ChatTemplates:
    """The chat templates of a checkpoint by name; "default" is the one meant for chat.

    ``found`` is what checkpoints store: a string, or a list of {"name": ..., "template": ...};
    it is kept as ``stored``.

    Raises:
        CheckpointError: anything else.
    """

    def __init__(self, found: Any, where: str) -> None:
        self._where = where
        self.stored = found
        if found is None:
            self._templates: dict[str, str] = {}
            return
        entries = [{"name": "default", "template": found}] if isinstance(found, str) else found
        if not isinstance(entries, list) or not all(_is_entry(e) for e in entries):
            raise CheckpointError(
                f"{where}: chat_template: found {type(found).__name__}, wanted a string of at most "
                f"{MAX_TEMPLATE_CHARS} characters or a list of names and templates"
            )
        self._templates = {e["name"]: e["template"] for e in entries}

    @property
    def default(self) -> str | None:
        """The template for chat, None where the checkpoint has none."""
        return self._templates.get("default")

    def choose(self, name: str | None, tools: Any) -> str:
        """The template called ``name``, or ``name`` itself as a template, or the default.

        Raises:
            CheckpointError: the checkpoint has no template for this.
        """
        if name is not None:
            return self._templates.get(name, name)
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if self.default is None:
            named = ", ".join(sorted(self._templates))
            raise CheckpointError(
                f"{self._where}: the model has no "
                + (
                    f"default chat template (found: {named}); name one"
                    if named
                    else "chat template"
                )
                + "; for plain continuation use generate"
            )
        return self.default

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> str:
        """The text of a conversation.

        Raises:
            InvalidShapeError: messages of the wrong kind, or that the template refuses.
            CheckpointError: the template is no valid jinja2, or reaches outside the sandbox.
        """
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
            raise _bad_messages(type(messages).__name__)
        if not messages:
            raise InvalidShapeError("messages: found none, wanted at least one")
        chat = []
        for message in messages:
            if not isinstance(message, Mapping):
                raise _bad_messages(f"a {type(message).__name__} in the list")
            chat.append({k: v for k, v in plain(message).items() if v is not None})
        from jinja2.exceptions import SecurityError, TemplateSyntaxError

        try:
            return str(_compile(template).render(messages=chat, **plain(variables)))
        except (TemplateSyntaxError, SecurityError) as error:
            raise CheckpointError(f"{self._where}: chat_template: {error}") from error
        except Exception as error:  # whatever a template can raise, raise_exception included
            raise InvalidShapeError(
                f"messages: the chat template refuses them: {type(error).__name__}: {error}"
            ) from error


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        and len(entry["template"]) <= MAX_TEMPLATE_CHARS
    )


def _bad_messages(found: str) -> InvalidShapeError:
    return InvalidShapeError(
        f'messages: found {found}, wanted a list of {{"role": ..., "content": ...}}'
    )


def plain(value: Any) -> Any:
    """``value`` rebuilt of JSON's types: objects with methods stay out of the template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """The compiled template in an environment like that of transformers."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock, Node
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks text for training masks; rendering passes it through."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

        def parse(self, parser: Any) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

        def _pass(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
