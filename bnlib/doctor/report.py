"""What the doctor says: findings, and the report that shows them as text, table, HTML and JSON."""

import json
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
COLOURS = {"error": "red", "warning": "yellow", "note": "blue"}
WIDTH = 75  # what a page of the book holds, and a terminal of 80 columns


@dataclass(frozen=True)
class Finding:
    """One mistake at one layer: what was measured, against what, and what to do.

    layer: the module's path in the model, "" for the model as a whole. value is what was measured,
    threshold what it was held against; message says why, and where the threshold comes from. fix is
    a line of Python, link the section of the book that reproduces the mistake.
    """

    rule: str
    slug: str
    severity: Severity
    layer: str
    value: float
    threshold: float
    message: str
    fix: str
    link: str


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object that has these entries and no others."""
    shape = {"type": "object", "additionalProperties": False}
    return shape | {"required": list(properties), "properties": properties}


_TEXT = {"type": "string"}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A report of bnlib.doctor",
} | _object(
    {
        "version": {"const": 1},
        "ok": {"type": "boolean", "description": "no error and no warning"},
        "counts": _object({severity: {"type": "integer"} for severity in SEVERITIES}),
        "findings": {
            "type": "array",
            "description": "worst first",
            "items": _object(
                {
                    "rule": {"type": "string", "pattern": "^BN[0-9]{3}$"},
                    "slug": _TEXT,
                    "severity": {"enum": list(SEVERITIES)},
                    "layer": _TEXT | {"description": "path; empty for the whole model"},
                    "value": {"type": ["number", "null"], "description": "null: not finite"},
                    "threshold": {"type": "number"},
                    "message": _TEXT,
                    "fix": _TEXT | {"description": "a line of Python"},
                    "link": _TEXT | {"description": "the section of the book"},
                }
            ),
        },
        "batch_norms": {"type": "integer", "description": "how many were looked at"},
        "rules_checked": {"type": "array", "items": _TEXT, "description": "slugs"},
        "skipped": {
            "type": "object",
            "additionalProperties": _TEXT,
            "description": "the slug of a rule that could not be checked, and why",
        },
    }
)


def _book() -> str:
    """Return where the pages of this copy are published, by what its package says; or nothing."""
    try:
        urls = metadata("batchnorm-book").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    found = re.search(r"https://(github|gitlab)\.com/([^/\s]+)/(\S+)", "\n".join(urls))
    return f"https://{found[2]}.{found[1]}.io/{found[3]}/" if found else ""


BOOK = _book()


class _Row(NamedTuple):
    """A line of the table: one finding, or how many more there are of its kind."""

    severity: str
    rule: str
    layer: str
    value: str
    limit: str
    finding: Finding


@dataclass(frozen=True)
class Report:
    """The findings of a diagnosis, worst first, and what was checked.

    rules_checked: slugs in reading order. skipped: the slug of each rule that could not be checked,
    and why. batch_norms: how many were looked at. Notebooks and rich show a table; str() is the
    same as plain text.
    """

    findings: list[Finding]
    rules_checked: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    batch_norms: int = 0

    def __post_init__(self) -> None:
        self.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))

    @property
    def errors(self) -> list[Finding]:
        """What makes results wrong."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """What is probably a mistake."""
        return [f for f in self.findings if f.severity == "warning"]

    @property
    def notes(self) -> list[Finding]:
        """What is worth knowing, and may be meant."""
        return [f for f in self.findings if f.severity == "note"]

    @property
    def ok(self) -> bool:
        """Whether there is no error and no warning."""
        return not self.errors and not self.warnings

    def to_json(self) -> str:
        """Return the report as JSON, as `SCHEMA` says; a value that is not finite is null."""
        values = [f.value if math.isfinite(f.value) else None for f in self.findings]
        content = {
            "version": 1,
            "ok": self.ok,
            "counts": {s: len(getattr(self, f"{s}s")) for s in SEVERITIES},
            "findings": [
                asdict(f) | {"value": v} for f, v in zip(self.findings, values, strict=True)
            ],
            "batch_norms": self.batch_norms,
            "rules_checked": self.rules_checked,
            "skipped": self.skipped,
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [self._counts()]
        if self.findings:
            lines += ["", f"{'':8}{'rule':32}{'layer':18}{'found':>8} {'limit':>8}"]
        for severity, rule, layer, value, limit, _ in self._rows():
            layer = layer if len(layer) <= 17 else "…" + layer[-16:]
            lines.append(f"{severity:8}{rule:32}{layer:18}{value:>8} {limit:>8}".rstrip())
        for finding in self._first_of_each():
            name = f"{finding.rule} {finding.slug}"
            lines += ["", *_wrapped(f"{name}: {_visible(finding.message)}")]
            lines += [f"  fix   {_visible(finding.fix)}", f"  book  {_page(finding)}"]
        lines += [""] * bool(self.findings)
        return "\n".join([*lines, *(line for text in self._scope() for line in _wrapped(text))])

    def __rich__(self) -> "RenderableType":
        from rich import box
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("", "rule", "layer", "found", "limit"):
            side: Literal["left", "right"] = "right" if name in ("found", "limit") else "left"
            table.add_column(name, justify=side, no_wrap=name != "layer", overflow="fold")
        for row in self._rows():
            cells = [Text(text) for text in row[:5]]
            cells[0].stylize(COLOURS[row.finding.severity])
            cells[1].stylize(f"link {row.finding.link}")
            table.add_row(*cells)
        parts: list[RenderableType] = [Text(self._counts(), "bold")]
        parts += [table] if self.findings else []
        for finding in self._first_of_each():
            name = f"{finding.rule} {finding.slug}"
            page = (_page(finding), f"link {finding.link}")
            fix = (_visible(finding.fix), "bold")
            text = Text.assemble(_visible(finding.message), "\nfix   ", fix, "\nbook  ", page)
            parts += [Text(name, f"bold {COLOURS[finding.severity]}"), Padding(text, (0, 0, 1, 2))]
        return Group(*parts, *(Text(text, "dim") for text in self._scope()))

    def _repr_html_(self) -> str:
        names = ("", "rule", "layer", "found", "limit", "why, and what to do")
        head = "".join(f'<th scope="col">{name}</th>' for name in names)
        body, told = "", set[str]()
        for row in self._rows():
            f = row.finding
            why = f"{escape(f.message)}<br><code>{escape(f.fix)}</code>"
            rule = f'<a href="{escape(f.link)}">{row.rule}</a>' if row.rule else ""
            cells = [row.severity, rule, escape(row.layer), row.value, row.limit]
            cells.append("" if f.rule + f.severity in told else why)
            told.add(f.rule + f.severity)
            body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        scope = "".join(f"<p>{escape(text)}</p>" for text in self._scope())
        return f"<p>{self._counts()}</p>{table if self.findings else ''}{scope}"

    def _counts(self) -> str:
        numbers = [(s, len(getattr(self, f"{s}s"))) for s in SEVERITIES]
        counts = ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in numbers)
        return counts if self.findings else "Nothing found."

    def _groups(self) -> list[list[Finding]]:
        """Return the findings rule by rule, those of one severity together."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.rule), []).append(finding)
        return list(groups.values())

    def _rows(self, most: int = 5) -> Iterator[_Row]:
        for group in self._groups():
            for f in group[:most]:
                layer = _visible(f.layer) or "(the model)"
                numbers = f"{f.value:.3g}", f"{f.threshold:.3g}"
                yield _Row(f.severity, f"{f.rule} {f.slug}", layer, *numbers, f)
            if len(group) > most:
                yield _Row("", "", f"and {len(group) - most} more", "", "", f)

    def _first_of_each(self) -> list[Finding]:
        return [group[0] for group in self._groups()]

    def _scope(self) -> Iterator[str]:
        """Say what was looked at, and what was not and why."""
        n = self.batch_norms
        norms = f"{n or 'no'} batch norm{'s' * (n > 1)}"
        yield f"Looked at {norms}; checked {', '.join(self.rules_checked) or 'no rule'}."
        for reason in dict.fromkeys(self.skipped.values()):
            slugs = [slug for slug, why in self.skipped.items() if why == reason]
            yield f"Not checked: {', '.join(slugs)}: {_visible(reason)}."


def _page(finding: Finding) -> str:
    return finding.link.removeprefix(BOOK)


def _visible(text: str) -> str:
    """Make visible what would act on a terminal: the names in a checkpoint are anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
