"""Rules of this code base that no linter knows; `make lint` runs them alone."""

import ast
import collections
import configparser
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {
    "repalign": "repalign",
    "kernels": "repalign.kernels",
    "experiments": "repalign.experiments",
}
PACKAGE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BANNED = ("pmap", "pjit", "with mesh", "jax.tree_map", "jax.experimental.shard_map")
EMPTY_NAMES = {"utils.py", "common.py", "base.py", "helpers.py", "misc.py"}


def offences(check, paths=PACKAGE):
    """Returns ``file:line`` wherever ``check(node)`` holds."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if check(node)
    ]


def test_the_rules_look_at_something():
    assert len(PACKAGE) > 50 and len(TESTS) > 30


def test_banned_words():
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in (*PACKAGE, *TESTS)
        if path != pathlib.Path(__file__)
        for word in BANNED
        if re.search(rf"\b{re.escape(word)}\b", path.read_text())
    ]
    assert not found


def is_get_with_default(node):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and len(node.args) + len(node.keywords) > 1
        and ast.unparse(node.func.value) != "os.environ"
    )


def is_getattr_with_none(node):
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and ast.unparse(node.args[2]) == "None"
    )


def is_stub(node):
    return isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)


@pytest.mark.parametrize("check", [is_get_with_default, is_getattr_with_none, is_stub])
def test_nothing_falls_back_silently(check):
    assert not offences(check)


@pytest.mark.parametrize(
    ("code", "check"),
    [
        ("config.get('depth', 3)", is_get_with_default),
        ("config.get('depth', default=3)", is_get_with_default),
        ("getattr(config, 'depth', None)", is_getattr_with_none),
        ("raise NotImplementedError()", is_stub),
    ],
)
def test_the_checks_see_what_they_ban(code, check):
    assert any(check(node) for node in ast.walk(ast.parse(code)))
    allowed = "os.environ.get('A', 'b'); table.get(key); getattr(x, name, 0); raise ValueError"
    assert not any(check(node) for node in ast.walk(ast.parse(allowed)))


def test_comments_hide_nothing():
    comment = r"#\s*(noqa|type:\s*ignore|TODO|FIXME|pragma)"
    hidden = re.compile(comment + r"|pytest\.(mark\.)?(skip|xfail)")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (*PACKAGE, *TESTS)
        if path != pathlib.Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if hidden.search(line)
    ]
    assert not found


def test_files_are_short_and_named_after_what_is_in_them():
    paths = (*PACKAGE, *TESTS)
    assert not [path for path in paths if len(path.read_text().splitlines()) > 500]
    assert not [path for path in paths if path.name in EMPTY_NAMES]


def test_test_files_have_distinct_names():
    """Without packages in tests/, pytest imports two files of one name as the same module."""
    counts = collections.Counter(path.name for path in TESTS)
    assert not [name for name, count in counts.items() if count > 1]


def test_no_path_of_one_machine():
    texts = [*PACKAGE, *TESTS, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.cfg")]
    machine = re.compile(r"(?<![\w.~$}])/(work|tmp|root|home|Users)/")
    found = [
        path.relative_to(ROOT)
        for path in texts
        if path != pathlib.Path(__file__) and machine.search(path.read_text())
    ]
    assert not found


def imported_modules(path):
    """Yields (module, whether the import is inside a function)."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        yield from ((name, id(node) not in top) for name in names)


def test_kernels_depend_on_jax_only():
    allowed = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
    found = []
    for path in (ROOT / "kernels").rglob("*.py"):
        for module, inside in imported_modules(path):
            own = module == "repalign.kernels" or module.startswith("repalign.kernels.")
            peer = path.name in ("bench.py", "peers.py") and inside
            if not (own or peer or module.split(".")[0] in allowed):
                found.append(f"{path.relative_to(ROOT)}: {module}")
    assert not found


def test_losses_and_quantizers_do_not_import_flax():
    found = [
        path.relative_to(ROOT)
        for family in ("losses", "quantizers", "metrics", "latent_maps")
        for path in (ROOT / "repalign" / family).glob("*.py")
        for module, _ in imported_modules(path)
        if module.split(".")[0] == "flax" or module.startswith("repalign.models")
    ]
    assert not found


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_setup_lists_every_package(setup):
    listed = set(setup["options"]["packages"].split())
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE}
    packages = {".".join([FOLDERS[folder.parts[0]], *folder.parts[1:]]) for folder in folders}
    assert listed == packages


def test_setup_ships_every_data_file(setup):
    data = setup["options.package_data"]
    patterns = {"repalign": "repalign", "experiments": "repalign.experiments"}
    for folder, package in patterns.items():
        files = {
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        shipped = set()
        for name, globs in data.items():
            if name == package or name.startswith(f"{package}."):
                inside = ROOT / folder / pathlib.Path(*name.removeprefix(package).split("."))
                shipped |= {path for one in globs.split() for path in inside.glob(one)}
        assert files and files <= shipped, sorted(files - shipped)
