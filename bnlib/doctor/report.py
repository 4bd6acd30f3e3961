"""What the doctor says: findings, and the report that shows them as text, table, HTML and JSON."""

import html
import json
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
WIDTH = 80

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Report of bnlib.doctor",
    "type": "object",
    "additionalProperties": False,
    "required": ["version", "ok", "counts", "findings", "batch_norms", "rules_checked", "skipped"],
    "properties": {
        "version": {"const": 1},
        "ok": {"type": "boolean", "description": "no error and no warning"},
        "counts": {
            "type": "object",
            "additionalProperties": False,
            "required": list(SEVERITIES),
            "properties": {s: {"type": "integer", "minimum": 0} for s in SEVERITIES},
        },
        "findings": {"type": "array", "items": {"$ref": "#/$defs/finding"}},
        "batch_norms": {"type": "integer", "minimum": 0, "description": "how many were looked at"},
        "rules_checked": {"type": "array", "items": {"type": "string"}, "description": "slugs"},
        "skipped": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "slug of a rule that could not be checked: why",
        },
    },
    "$defs": {
        "finding": {
            "type": "object",
            "additionalProperties": False,
            "required": [
                *("rule", "slug", "severity", "layer", "value", "threshold"),
                *("message", "fix", "link"),
            ],
            "properties": {
                "rule": {"type": "string", "pattern": "^BN[0-9]{3}$"},
                "slug": {"type": "string", "pattern": "^[a-z]+(-[a-z]+)*$"},
                "severity": {"enum": list(SEVERITIES)},
                "layer": {"type": "string", "description": "path; empty for the whole model"},
                "value": {"type": ["number", "null"], "description": "null if not finite"},
                "threshold": {"type": "number"},
                "message": {"type": "string"},
                "fix": {"type": "string", "description": "a line of Python"},
                "link": {"type": "string", "description": "the section of the book"},
            },
        }
    },
}


def _book() -> str:
    """Return where the pages of this copy are published, by what its package says; or nothing."""
    try:
        urls = metadata("batchnorm-book").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    found = re.search(r"https://(github|gitlab)\.com/([^/\s]+)/(\S+)", "\n".join(urls))
    return f"https://{found[2]}.{found[1]}.io/{found[3]}/" if found else ""


BOOK = _book()


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


@dataclass(frozen=True)
class Report:
    """The findings of a diagnosis, worst first, and what was checked.

    rules_checked: slugs in reading order. skipped: the slug of each rule that could not be checked,
    and why. batch_norms: how many were looked at. Shown as a table in notebooks and, by rich, in
    terminals; str() is plain text.
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

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON, as `SCHEMA` says; a value that is not finite is null."""
        return json.dumps(
            {
                "version": 1,
                "ok": self.ok,
                "counts": {s: len(getattr(self, f"{s}s")) for s in SEVERITIES},
                "findings": [
                    asdict(f) | {"value": f.value if math.isfinite(f.value) else None}
                    for f in self.findings
                ],
                "batch_norms": self.batch_norms,
                "rules_checked": self.rules_checked,
                "skipped": self.skipped,
            },
            indent=indent,
            allow_nan=False,
        )

    def __str__(self) -> str:
        lines = [self._counts(), ""]
        if self.findings:
            lines.append(f"{'':8}{'rule':32}{'layer':23}{'found':>8} {'limit':>8}")
        for group in self._groups():
            for finding, more in _shown(group):
                layer = _shortened(_layer(finding), 22)
                rule = f"{finding.rule} {finding.slug}"
                numbers = f"{finding.value:8.3g} {finding.threshold:8.3g}"
                lines.append(f"{finding.severity:8}{rule:32}{layer:23}{numbers}")
                if more:
                    lines.append(f"{'':40}and {more} more")
        for group in self._groups():
            lines += ["", *_wrapped(f"{group[0].rule} {group[0].slug}: {_clean(group[0].message)}")]
            lines += [f"  fix   {_clean(group[0].fix)}", f"  book  {_page(group[0])}"]
        lines += [line for sentence in self._scope() for line in ("", *_wrapped(sentence))]
        return "\n".join(lines).replace("\n\n\n", "\n\n")

    def __rich__(self) -> "RenderableType":
        from rich import box
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        colours = {"error": "red", "warning": "yellow", "note": "blue"}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("")
        table.add_column("rule", no_wrap=True)
        table.add_column("layer", overflow="fold", max_width=22)
        table.add_column("found", justify="right")
        table.add_column("limit", justify="right")
        advice: list[RenderableType] = []
        for group in self._groups():
            for finding, more in _shown(group):
                table.add_row(
                    Text(finding.severity, colours[finding.severity]),
                    Text(f"{finding.rule} {finding.slug}", style=f"link {finding.link}"),
                    Text(_shortened(_layer(finding), 44) + (f"\nand {more} more" if more else "")),
                    f"{finding.value:.3g}",
                    f"{finding.threshold:.3g}",
                )
            first = group[0]
            advice.append(Text(f"{first.rule} {first.slug}", f"bold {colours[first.severity]}"))
            lines = Text.assemble(
                _clean(first.message), "\nfix   ", (_clean(first.fix), "bold"), "\nbook  "
            )
            lines.append(_page(first), style=f"link {first.link}")
            advice.append(Padding(lines, (0, 0, 1, 2)))
        parts: list[RenderableType] = [Text(self._counts(), "bold")]
        parts += [table, *advice] if self.findings else [Text()]
        return Group(*parts, *(Text(sentence, "dim") for sentence in self._scope()))

    def _repr_html_(self) -> str:
        columns = ("", "rule", "layer", "found", "limit", "why, and what to do")
        head = "".join(f'<th scope="col">{name}</th>' for name in columns)
        rows = []
        for group in self._groups():
            for finding, more in _shown(group):
                address, name = html.escape(finding.link), f"{finding.rule} {finding.slug}"
                others = f"<br>and {more} more" if more else ""
                why, fix = html.escape(finding.message), html.escape(finding.fix)
                cells = [
                    f"<strong>{finding.severity}</strong>",
                    f'<a href="{address}">{html.escape(name)}</a>',
                    f"<code>{html.escape(_layer(finding))}</code>{others}",
                    f"{finding.value:.3g}",
                    f"{finding.threshold:.3g}",
                    f"{why}<br><code>{fix}</code>",
                ]
                rows.append("".join(f'<td style="text-align: left">{c}</td>' for c in cells))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        scope = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self._scope())
        return f"<p>{html.escape(self._counts())}</p>{table if self.findings else ''}{scope}"

    def _counts(self) -> str:
        if not self.findings:
            return "Nothing found."
        numbers = [(s, len(getattr(self, f"{s}s"))) for s in SEVERITIES]
        return ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in numbers)

    def _groups(self) -> Iterator[list[Finding]]:
        """Yield the findings rule by rule, those of one severity together."""
        keys = dict.fromkeys((f.severity, f.rule) for f in self.findings)
        for key in keys:
            yield [f for f in self.findings if (f.severity, f.rule) == key]

    def _scope(self) -> Iterator[str]:
        """Say what was looked at, and what was not and why."""
        n = self.batch_norms
        norms = f"{n} batch norm{'s' * (n != 1)}" if n else "no batch norm"
        yield f"Looked at {norms}; checked {', '.join(self.rules_checked) or 'no rule'}."
        for reason in dict.fromkeys(self.skipped.values()):
            slugs = [slug for slug, why in self.skipped.items() if why == reason]
            yield f"Not checked: {', '.join(slugs)}: {_clean(reason)}."


def _shown(group: list[Finding], most: int = 5) -> Iterator[tuple[Finding, int]]:
    """Yield the first findings of a group, and with the last of them how many more there are."""
    for i, finding in enumerate(group[:most], start=1):
        yield finding, len(group) - most if i == most < len(group) else 0


def _layer(finding: Finding) -> str:
    return _clean(finding.layer) or "(the model)"


def _page(finding: Finding) -> str:
    return finding.link.removeprefix(BOOK)


def _clean(text: str) -> str:
    """Make visible what would act on a terminal: the names in a checkpoint are anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
