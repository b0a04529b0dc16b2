"""Archives and pickles of the authors, read without running what is in them."""
import io
import pickle
import pickletools
import re
import zipfile

import numpy as np

from run import InputError, first_line

MOST_BYTES = 64 << 20  # of a member of an archive; the largest ones that exist have 2 MiB


OF_MACOS = re.compile(r"(^|/)(__MACOSX/|\._[^/]*$)")  # members that macOS adds: properties of files, no content


class PickledDtype:
    """Stands for `numpy.dtype` in a pickle: a code such as f4, then (version, byte order, ...) as state."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", str(code)):
            raise pickle.UnpicklingError(f"holds values of dtype {str(code)[:20]}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class PickledArray:
    """Stands for an array being rebuilt; (version, shape, dtype, Fortran order, bytes) follow as its state."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


class StandIn:
    """Calls a function, and has no attribute that a pickle could set."""
    __slots__ = ()

    def __call__(self, *arguments):
        return self.stands_for(*arguments)


class FromBuffer(StandIn):
    __slots__ = ()

    @staticmethod
    def stands_for(content, kind, shape, order):  # since protocol 5
        found = PickledArray()
        found.__setstate__((1, shape, kind, order == "F", content))
        return found


class Encode(StandIn):
    __slots__ = ()

    @staticmethod
    def stands_for(text, codec):  # how Python 3 puts bytes in protocol 2
        return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """A pickle from a public drive can run any program. This reader knows five names, all of them NumPy's (of old and
    new module paths), gives each a stand-in of its own, and refuses every other."""
    ADMITTED = {"numpy.core.multiarray._reconstruct": PickledArray, "numpy.core.numeric._frombuffer": FromBuffer(),
                "numpy.ndarray": "ndarray", "numpy.dtype": PickledDtype, "_codecs.encode": Encode()}

    def find_class(self, module, name):
        wanted = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if wanted not in self.ADMITTED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, only NumPy arrays are admitted")
        return self.ADMITTED[wanted]


# Operations of pickles that hold an array or a table of numbers; hashing nested keys may take for ever.
NEVER = {"SETITEM", "SETITEMS", "DICT", "EMPTY_DICT", "ADDITEMS", "EMPTY_SET", "FROZENSET"}  # in an array
TABLE = {"PROTO", "FRAME", "EMPTY_DICT", "DICT", "MARK", "INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2",
         "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}


def unpickle(content: bytes, where: str, table: bool = False):
    """The array, or the dict of numbers (`table`), in a pickle; InputError if it holds or does anything else."""
    try:
        calls = 0
        for code, argument, _ in pickletools.genops(content):  # also finds lengths that are longer than the file
            calls += code.name in ("REDUCE", "BUILD", "NEWOBJ")
            if code.name in NEVER and not table or code.name not in TABLE and table or calls > 16:
                raise pickle.UnpicklingError(f"holds more than {'numbers' if table else 'an array'} ({code.name})")
            if code.name.endswith("PUT") and int(argument) > len(content):
                raise pickle.UnpicklingError("a memo of that size takes memory and nothing else")
        found = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a hostile pickle can raise anything
        raise InputError(f"{where}: refused, {first_line(error)}")
    return found.array if isinstance(found, PickledArray) else found


def read_archive(path: str, faithful: bool = False) -> np.ndarray:
    """The one array in one of the authors' zip archives. Raises InputError naming the archive and the member."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if ".pkl" in m.filename and not OF_MACOS.search(m.filename)]
            names = {m: m.filename if m.filename.isprintable() else repr(m.filename) for m in archive.infolist()}
            for member, name in names.items():
                if member.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.filename):
                    raise InputError(f"{path}: member {name} leads out of the archive, refused")
            if len(members) != 1 and not (members and faithful):  # the released reader takes the last one
                some = ", ".join(list(names.values())[:4]) or "nothing"
                raise InputError(f"{path}: {len(members)} members named .pkl, expected one (of {some})")
            where = f"{path}: member {names[members[-1]]}"
            with archive.open(members[-1]) as stream:
                content = stream.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise InputError(f"{where} is larger than {MOST_BYTES >> 20} MiB, refused")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such archive")
    except Exception as error:  # a damaged or hostile archive can raise anything
        raise InputError(f"{path}: not a readable zip archive ({first_line(error)})")
    array = unpickle(content, where)
    if not isinstance(array, np.ndarray):
        raise InputError(f"{where} holds a {type(array).__name__}, expected a NumPy array")
    return array
