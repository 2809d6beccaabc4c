"""The YAML file, the overrides, and the settings one by one. What does not go together is in `contradictions`."""

from qlora_dist.config.catalogue.entry import Mendable

CONFIGURATION: dict[str, Mendable] = {
    "config-missing": Mendable(
        "{path}: there is no such file",
        "give the path of a YAML file",
    ),
    "config-misspelt": Mendable(
        "{path}: there is no such file",
        "did you mean {nearest}?",
    ),
    "config-is-folder": Mendable(
        "{path} is a folder",
        "give the path of a YAML file in it",
    ),
    "config-unreadable": Mendable(
        "{path} cannot be read ({error})",
        "make it a UTF-8 text file that you may read",
    ),
    "config-not-utf8": Mendable(
        "{path}, line {line} is not UTF-8",
        "save the file as UTF-8",
    ),
    "config-not-yaml": Mendable(
        "{where}: {problem}",
        "mend the YAML there, or put quotes around what is text",
    ),
    "config-tag": Mendable(
        "{where}: the tag {tag} is not read",
        "remove it",
    ),
    "config-key-no-name": Mendable(
        "{where}: a list or mapping cannot be a key",
        "write a setting's name there",
    ),
    "config-key-twice": Mendable(
        "{where}: the key {key!r} is written twice",
        "remove one",
    ),
    "config-empty": Mendable(
        "{path} holds no settings",
        "write a mapping such as 'model: {{name: ...}}'",
    ),
    "override-form": Mendable(
        "{override!r} is no override",
        "write section.field=value, such as train.max_steps=50",
    ),
    "override-not-yaml": Mendable(
        "{override!r}: {problem}",
        "quote the value where it is text, or the whole override where your shell has split it",
    ),
    "override-into-value": Mendable(
        "{override!r}: {setting} is a value, not a section",
        "name a field of a section, or set {setting} itself",
    ),
    "setting-misspelt": Mendable(
        "{setting} is not a setting ({where})",
        "did you mean {nearest}?",
    ),
    "setting-unknown": Mendable(
        "{setting} is not a setting ({where})",
        "the settings there are {settings}",
    ),
    "setting-is-secret": Mendable(
        "{setting} is not a setting, and no secrets belong in the configuration ({where})",
        "remove it and set HF_TOKEN, WANDB_API_KEY or AWS_SECRET_ACCESS_KEY in the environment",
    ),
    "setting-missing": Mendable(
        "{setting} is missing ({where})",
        "add it",
    ),
    "setting-is-section": Mendable(
        "{setting} is {given}, but it is a section ({where})",
        "write its fields below it, each on a line of its own",
    ),
    "setting-value": Mendable(
        "{setting} is {given} ({where})",
        "it must be {demand}",
    ),
    "cache-not-writable": Mendable(
        "{setting}: {folder} cannot be written ({error})",
        "set {setting} to a folder that you may write",
    ),
}
