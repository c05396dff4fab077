"""Checks that a model's tokenizer fits its vocabulary."""

from tokenizers import Tokenizer

from moe_dist.errors import DataError
from moe_dist.hf.source import Source, inside

TOKENIZER_FILE = "tokenizer.json"


def check_tokenizer(source: Source, *, vocab_size: int) -> None:
    """Reads tokenizer.json if it exists. Fewer tokens than rows are accepted: vocabularies are padded.

    Raises:
        DataError: it cannot be read, or has ids without a row in the model.
    """
    if TOKENIZER_FILE not in source.companions:
        return
    path = inside(source.folder, TOKENIZER_FILE)
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path}: cannot be read: {error!s:.200}") from error
    token = max(vocabulary, key=lambda each: vocabulary[each], default=None)
    if token is not None and vocabulary[token] >= vocab_size:
        raise DataError(
            f"{path}: gives {token!r} the id {vocabulary[token]}, but the model's vocab_size={vocab_size}; it is another "
            "model's tokenizer: put the right one there, or take it away"
        )
