"""The text encoder: CLIP's (Radford et al. 2021), as Stable Diffusion 1.x uses it, and its tokenizer, offline."""

import contextlib
import gzip
import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn

MERGES_FILE = Path(__file__).parent / "clip_merges.txt.gz"
START, END = 49406, 49407  # token ids of <|startoftext|> and <|endoftext|>; the latter pads as well
MAX_LENGTH = 77

# CLIP cuts a text into contractions, words, single digits and runs of punctuation.
_PIECES = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@cache
def _tokenizer() -> Tokenizer:
    lines = gzip.decompress(MERGES_FILE.read_bytes()).decode().splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Every byte has a visible stand-in, GPT-2's; those that are visible already stand for themselves and come first.
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>", fuse_unk=False, unk_token="<|endoftext|>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytewise])
    return tokenizer


def _encodings(texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in _tokenizer().encode_batch(list(texts), add_special_tokens=False)]


def nb_tokens(texts: Sequence[str]) -> list[int]:
    """The number of each text's tokens, of which `tokenize` keeps MAX_LENGTH - 2."""
    return [len(ids) for ids in _encodings(texts)]


def tokenize(texts: str | Sequence[str]) -> Tensor:
    """CLIP token ids: int64, B x 77; start, the text cut to 75 tokens, end, and end again as padding.

    One string is one text.
    """
    rows = [[START, *ids[: MAX_LENGTH - 2]] for ids in _encodings([texts] if isinstance(texts, str) else texts)]
    return torch.tensor([row + [END] * (MAX_LENGTH - len(row)) for row in rows], dtype=torch.int64)


class FrozenCLIPEmbedder(nn.Module):
    """Texts -> B x 77 x hidden_size: CLIP's last hidden states after the final layer norm.

    The defaults are ViT-L/14's text model.  `version` and `device` are accepted because official configs may carry
    them; no hub is contacted.  Whatever the installed transformers calls its tensors (with `text_model.` or without,
    with `position_ids` or without), `state_dict` gives the official checkpoint's names and `load_state_dict` takes
    either.
    """

    def __init__(
        self, hidden_size: int = 768, intermediate_size: int = 3072, num_hidden_layers: int = 12,
        num_attention_heads: int = 12, version: str = "openai/clip-vit-large-patch14", device: str | None = None,
        max_length: int = MAX_LENGTH,
    ):  # fmt: skip
        super().__init__()
        if max_length != MAX_LENGTH:
            raise ValueError(f"max_length must be {MAX_LENGTH}, the text model's number of positions")
        with contextlib.suppress(ModuleNotFoundError):  # absent where this folder was copied alone
            import torchvision_compat  # noqa: F401  transformers imports torchvision
        # Imported here: it takes seconds, and nothing else of ControlNet needs it.
        from transformers import CLIPTextConfig, CLIPTextModel

        self.max_length = max_length
        config = CLIPTextConfig(
            hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads, max_position_embeddings=MAX_LENGTH, hidden_act="quick_gelu",
            bos_token_id=START, eos_token_id=END, pad_token_id=END,
        )  # fmt: skip
        self.transformer = CLIPTextModel(config)
        self._own_prefix = "text_model." if hasattr(self.transformer, "text_model") else ""
        self.register_state_dict_post_hook(self._to_official_names)
        self.register_load_state_dict_pre_hook(self._from_any_names)

    @property
    def _embeddings(self) -> nn.Module:
        return getattr(self.transformer, "text_model", self.transformer).embeddings

    @staticmethod
    def _to_official_names(module, state: dict, prefix: str, metadata) -> None:
        own = f"{prefix}transformer.{module._own_prefix}"
        official = f"{prefix}transformer.text_model."
        for name in [name for name in state if name.startswith(own)]:
            state[official + name[len(own) :]] = state.pop(name)
        state[official + "embeddings.position_ids"] = module._embeddings.position_ids

    @staticmethod
    def _from_any_names(module, state: dict, prefix: str, metadata, strict, missing, unexpected, errors) -> None:
        root = f"{prefix}transformer."
        for name in [name for name in state if name.startswith(root)]:
            bare = name[len(root) :].removeprefix("text_model.")
            tensor = state.pop(name)
            if bare != "embeddings.position_ids":  # counted, not learned: filled in below where it is stored
                state[root + module._own_prefix + bare] = tensor
        positions = f"{module._own_prefix}embeddings.position_ids"
        if positions in module.transformer.state_dict():
            state[root + positions] = module._embeddings.position_ids

    @cached_property
    def tokenizer(self):
        """transformers' CLIPTokenizer with the bundled vocabulary, for scripts that call it themselves."""
        from transformers import CLIPTokenizer

        merges = [tuple(pair) for pair in json.loads(_tokenizer().to_str())["model"]["merges"]]
        return CLIPTokenizer(vocab=_tokenizer().get_vocab(), merges=merges)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """One text or several -> B x 77 x hidden_size."""
        return self.transformer(input_ids=tokenize(text).to(self.device)).last_hidden_state

    def encode(self, text: str | Sequence[str]) -> Tensor:
        return self(text)
