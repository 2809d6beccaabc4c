"""Sources of data, the rows in them, chat templates and the settings of `data`."""

from qlora_dist.config.catalogue.entry import Mendable

# `place` is file:line, "file, row N", or either with the key that is meant.
ROWS: dict[str, Mendable] = {
    "json-malformed": Mendable("{place} is not JSON ({reason} at column {column})", "mend it there"),
    "json-line-malformed": Mendable(
        "{place} is not JSON ({reason} at column {column})", "put one whole JSON object on each line"
    ),
    "json-too-deep": Mendable(
        "{place} is nested too deeply", "mend it there: put fewer lists and objects inside one another"
    ),
    "json-number-too-long": Mendable("{place} holds a number of too many digits", "mend it, or quote it as a string"),
    "json-not-a-list": Mendable(
        "{file} is not a list of rows", 'make it [{{...}}, ...], {{"data": [...]}}, or JSON lines'
    ),
    "row-not-an-object": Mendable("{place} is {kind}, not a JSON object", "put one {{...}} there"),
    "not-utf8": Mendable("{place} is not UTF-8 (byte {byte} of the {whole})", "save the file as UTF-8"),
    "csv-malformed": Mendable("{place} is not CSV ({reason})", "mend the quotes there"),
    "csv-column-unnamed": Mendable("{place}: column {column} has no name", "name every column in the first line"),
    "csv-column-twice": Mendable("{place} names the column `{column}` twice", "rename one of them"),
    "csv-cells": Mendable(
        "{place} has {cells} cells where the first line names {columns} columns",
        "mend the row, or quote cells that hold the separator",
    ),
    "parquet-unreadable": Mendable("{file} is not a readable Parquet file ({reason})", "write it again"),
    "row-format-ambiguous": Mendable(
        "{place} fits the formats {formats} (keys: {keys})", "name one of them in data.format"
    ),
    "row-format-unknown": Mendable(
        "{place} fits no known format (keys: {keys})", "map its keys with data.fields, or use those of {accepted}"
    ),
    "row-lacks-key": Mendable(
        "{place} lacks the key `{key}` of the format {format} (keys: {keys})",
        "mend the row or name another format in data.format",
    ),
    "row-lacks-column": Mendable(
        "{place} lacks the column `{column}` that data.fields.{field} names (columns: {columns})",
        "name one of its columns there, or add the column to the row",
    ),
    "prompt-completion-kinds": Mendable(
        "{place}: prompt and completion differ in kind", "make both strings or both message lists"
    ),
    "messages-not-json": Mendable("{place} is not JSON ({reason})", "mend the list"),
    "messages-not-a-list": Mendable(
        "{place} must be a non-empty list of objects with {keys}", "put the turns of the conversation there"
    ),
    "message-not-an-object": Mendable("{place} is not an object", "give it {keys}"),
    "role-unknown": Mendable("{place} has the role {role!r}", "use one of {accepted}"),
    "text-not-a-string": Mendable("{place} is of type {type}", "make it a string"),
    "text-empty": Mendable("{place} is empty", "fill it in or remove it"),
    "answer-empty": Mendable(
        "{place} is empty", "fill it in or remove it; data.filter.drop_empty_answers: true leaves all such rows out"
    ),
    "half-a-surrogate": Mendable(
        "{place} holds half of a surrogate pair, which is no character", "remove it, or write the whole character"
    ),
    "no-assistant-message": Mendable("{place} has no assistant message to learn from", "add one or remove the row"),
    "begins-with-assistant": Mendable("{place} begins with the assistant", "put a user message before it"),
    "row-too-long": Mendable(
        "{place} has {tokens} tokens, data.max_length is {max_length}",
        "raise it, or set data.too_long to truncate or drop",
    ),
}

SOURCES: dict[str, Mendable] = {
    "source-missing": Mendable("{field}: {place} does not exist", "give the path of {kinds}"),
    "source-unreadable": Mendable("{field}: {file} cannot be read ({reason})", "check its permissions"),
    "source-ending": Mendable("{field}: {file} has {ending}, which tells no format", "use one of {endings}"),
    "source-folder-empty": Mendable("{field}: {place} holds no file that ends in {endings}", "put one there"),
    "source-without-split": Mendable(
        "{field}: {place} has files for {splits}, none for {wanted}", "name a split with {place}#SPLIT, or one file"
    ),
    "source-without-rows": Mendable(
        "{field}: {place} holds no rows", "put one JSON object on each line, or name another source"
    ),
    "source-all-bad": Mendable(
        "{field}: {place} holds no row that can be read", "mend its rows, beginning with the first: {first}"
    ),
    "bundled-dataset-unknown": Mendable(
        "{field}: there is no bundled dataset {name!r} with {split} rows", "use one of: {names}"
    ),
    "saved-dataset-damaged": Mendable("{field}: {place} is not a whole `datasets` folder ({reason})", "save it again"),
    "dataset-without-split": Mendable(
        "{field}: {place} has the splits {splits}, none of them {wanted}", "name one with {place}#SPLIT"
    ),
    "hub-dataset-gated": Mendable(
        "{field}: the hub dataset {repo} is gated",
        "accept its conditions on the hub, then run `hf auth login` or set HF_TOKEN",
    ),
    "hub-dataset-revision": Mendable(
        "{field}: the hub dataset {repo} has no revision {revision!r}", "mend what follows the @"
    ),
    "hub-dataset-missing": Mendable(
        "{field}: {repo} is neither a path here nor a dataset that the hub shows you",
        "mend the name, or set HF_TOKEN if it is private",
    ),
    "hub-dataset-unreachable": Mendable(
        "{field}: {repo} does not exist here, and the hub cannot be reached ({reason})",
        "mend the path, or download the dataset where there is a network and give its folder",
    ),
    "hub-dataset-unloadable": Mendable(
        "{field}: the hub dataset {repo} cannot be loaded ({reason})",
        "name what it has as owner/name:subset@revision#split",
    ),
    "s3-without-bucket": Mendable("{field}: {url} names no bucket", "write s3://BUCKET/KEY"),
    "s3-nothing-there": Mendable("{field}: there is nothing at {url}", "mend the bucket or the key"),
    "s3-without-credentials": Mendable(
        "{field}: {url} needs AWS credentials and none are set",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every node",
    ),
    "s3-access-denied": Mendable(
        "{field}: access to {url} is denied with these AWS credentials", "check them and their rights"
    ),
    "s3-unreachable": Mendable(
        "{field}: the store of {url} does not answer", "check the network, AWS_ENDPOINT_URL and the region"
    ),
    "s3-unreadable": Mendable("{field}: {url} cannot be read ({reason})", "check the key"),
}

TEMPLATES: dict[str, Mendable] = {
    "chat-template-unknown": Mendable(
        "data.chat_template: {name} is neither a file nor one of {names}",
        "use one of them, or give the path of a .jinja file",
    ),
    "chat-template-unreadable": Mendable(
        "data.chat_template: {name} cannot be read ({reason})", "give a UTF-8 text file that you may read"
    ),
    "chat-template-empty": Mendable("data.chat_template: {name} is empty", "write a Jinja template there"),
    "chat-template-not-jinja": Mendable("data.chat_template: {name}:{line} is not Jinja ({reason})", "mend it there"),
    "chat-template-absent": Mendable(
        "model.name: the tokenizer of {model} has no chat template, which {place} needs",
        "use the instruct version of the model, data with `prompt` and `completion` as strings, or name a template "
        "in data.chat_template",
    ),
    "chat-template-refuses": Mendable(
        "{place}: the chat template of {model} refuses these messages ({reason})",
        "mend the row, or set data.on_bad_row: skip",
    ),
    "answer-not-found": Mendable(
        "{place}: the assistant's part cannot be told apart in the chat template of {model}",
        "set data.assistant_only_loss=false to learn all tokens",
    ),
    "tokenizer-without-offsets": Mendable(
        "model.name: the tokenizer of {model} gives no character offsets, without which the assistant's tokens "
        "cannot be found",
        "set data.assistant_only_loss=false to learn all tokens",
    ),
}

SELECTION: dict[str, Mendable] = {
    "fields-pattern": Mendable(
        "data.fields.{field} is {text!r} ({reason})", "write {{{{ for a brace of the text, {{column}} for a column"
    ),
    "fields-fit-no-row": Mendable("data.fields fits no row", "mend it, or the rows, beginning with the first: {first}"),
    "no-row-left": Mendable("data.{split}: no row of {source} is left of {rows} ({dropped})", "loosen data.filter"),
    "no-good-row-left": Mendable(
        "data.{split}: no row of {source} is left of {rows} ({dropped})",
        "mend the rows, beginning with the first: {first}",
    ),
    "no-document-left": Mendable(
        "data.{split}: no row is left of {rows}, with data.max_length={max_length} tokens ({dropped})",
        "raise data.max_length, or loosen data.filter and data.too_long",
    ),
    "all-leaked": Mendable(
        "data.filter.drop_leaked leaves no held-out row: all {rows} are training rows too", "hold out others"
    ),
    "eval-twice": Mendable("data.eval and data.eval_split are both set", "remove one of them"),
    "eval-split-fraction": Mendable(
        "data.eval_split={eval_split} is neither a share below 1 nor a whole number of rows", "make it one of them"
    ),
    "eval-split-takes-all": Mendable(
        "data.eval_split={eval_split} holds out {held_out} of {rows} rows and leaves none to train on",
        "set it to fewer rows than there are, or to a share such as 0.1",
    ),
}

DATA: dict[str, Mendable] = SOURCES | ROWS | TEMPLATES | SELECTION
