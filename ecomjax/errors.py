"""The one exception type for mistakes a user can make and mend."""


class UserError(Exception):
    """A mistake in a path, file, config or flag, told in one line.

    Commands print it as `error: <what>: <where>; <remedy>` and exit with status 2,
    without a traceback. Anything else that escapes is a defect of ours and keeps its
    traceback.

    Attributes:
        what: what is wrong, e.g. `missing column 'esci_label'`.
        where: file and line, config key or tensor name.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, where: str, remedy: str):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(" ".join(f"{what}: {where}; {remedy}".split()))
