"""What the files of a model folder say about its tokenizer, read and checked once.

Everything after this module trusts `TokenizerFiles`; whatever is malformed or not supported is refused here, by name.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from bough.runtime.protocol import RequestError

Json: TypeAlias = dict[str, Any]

_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Added tokens that are written like a mark (<think>, [TOOL_CALLS]) steer a chat even where not flagged special.
_MARK: Final = re.compile("[<\\[{|\uff5c].*[>\\]}|\uff5c]", re.DOTALL)


@dataclass(frozen=True)
class AddedToken:
    """A token matched as a whole before the model splits the text.

    `special` tokens are left out of generated text. `control` tokens (special ones, and marks such as <think>) are
    never made from ordinary text; the other added tokens (runs of spaces, say) are plain vocabulary.
    """

    id: int
    content: str
    special: bool
    control: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed files: `spec` is tokenizer.json, `vocab` its model's pieces, `named` bos_token and others as text."""

    folder: Path
    spec: Json
    config: Json
    vocab: dict[str, int]
    added: tuple[AddedToken, ...]
    named: dict[str, str]
    eos_ids: tuple[int, ...]

    def id_of(self, content: str) -> int | None:
        """Return the id of an added token or vocabulary piece, None if there is none."""
        for token in self.added:
            if token.content == content:
                return token.id
        return self.vocab.get(content)


def read_folder(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json.

    Raises RequestError("unsupported_model") naming the file and what is wrong with it.
    """
    config = read_json(folder / "tokenizer_config.json")
    spec = read_json(folder / "tokenizer.json") or _converted(folder)
    model = spec.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise refuse(folder, "tokenizer.json has no model with a vocabulary")
    vocab = _vocabulary(model["vocab"])
    named = named_tokens(folder, config)
    added = _added_tokens(folder, spec, config, vocab, named)
    known = {token.content: token.id for token in added}
    eos = [known.get(named["eos_token"], vocab.get(named["eos_token"]))] if "eos_token" in named else []
    for name in ("generation_config.json", "config.json"):
        eos += _eos_of(read_json(folder / name))
    size = max([*vocab.values(), *known.values()], default=-1) + 1
    # An id beyond the vocabulary can be a padded row of the model's output: it has no text, but it may still end it.
    eos_ids = tuple(dict.fromkeys(token for token in eos if token is not None and token >= 0))
    if size == 0:
        raise refuse(folder, "its vocabulary is empty")
    return TokenizerFiles(folder, spec, config, vocab, added, named, eos_ids)


def refuse(folder: Path, why: str) -> RequestError:
    """Return the error for a tokenizer that this runtime cannot serve."""
    return RequestError("unsupported_model", f"tokenizer of {folder}: {why}", field="model", value=str(folder))


def read_json(path: Path) -> Json:
    """Return the object in a file, {} if the file is missing. Raises RequestError("unsupported_model")."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(path.parent, f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise refuse(path.parent, f"{path.name} must hold an object, got {type(value).__name__}")
    return value


def named_tokens(folder: Path, config: Json) -> dict[str, str]:
    """Return bos_token, eos_token ... as text; tokenizer_config.json wins over special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in (read_json(folder / "special_tokens_map.json"), config):
        for name in _NAMED_TOKENS:
            content = _content(source.get(name))
            if content:
                found[name] = content
    return found


def _content(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _vocabulary(vocab: Json | list[Any]) -> dict[str, int]:
    if isinstance(vocab, dict):
        return {str(piece): int(index) for piece, index in vocab.items()}
    return {str(piece): index for index, (piece, _) in enumerate(vocab)}  # unigram: [piece, score] by id


def _added_tokens(
    folder: Path, spec: Json, config: Json, vocab: dict[str, int], named: dict[str, str]
) -> tuple[AddedToken, ...]:
    raw: dict[int, Json] = {}
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        raw[int(index)] = entry
    for entry in spec.get("added_tokens") or []:
        raw[int(entry["id"])] = entry
    present = {entry["content"] for entry in raw.values()}
    for content in named.values():  # transformers makes these special wherever the files forgot to
        if content not in present and content in vocab:
            raw[vocab[content]] = {"content": content, "special": True}
    tokens = []
    for index, entry in sorted(raw.items()):
        content = entry["content"]
        if not content:
            continue
        special = bool(entry.get("special")) or content in named.values()
        control = special or _MARK.fullmatch(content) is not None
        if control and entry.get("single_word"):
            raise refuse(folder, f"special token {content!r} is matched as a single word, which is not supported")
        tokens.append(
            AddedToken(
                index,
                content,
                special,
                control,
                lstrip=bool(entry.get("lstrip")),
                rstrip=bool(entry.get("rstrip")),
                single_word=bool(entry.get("single_word")),
                normalized=bool(entry.get("normalized")),
            )
        )
    return tuple(tokens)


def _eos_of(config: Json) -> list[int]:
    value = config.get("eos_token_id")
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and not isinstance(index, bool)]


def _converted(folder: Path) -> Json:
    """Return what transformers makes of a SentencePiece tokenizer.model, where it can."""
    if not (folder / "tokenizer.model").is_file():
        raise refuse(folder, "there is neither tokenizer.json nor tokenizer.model")
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    if missing:
        raise refuse(
            folder,
            f"there is no tokenizer.json, and converting tokenizer.model needs {' and '.join(missing)}; "
            "install that, or save the model's fast tokenizer into the folder",
        )
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        spec = json.loads(fast.backend_tokenizer.to_str())
    except Exception as error:  # whatever transformers raises, the model cannot be served
        raise refuse(folder, f"tokenizer.model could not be converted: {error}") from error
    assert isinstance(spec, dict), "tokenizers serialises to an object"
    return spec


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
