"""The report as text, as a table of rich, as HTML and as JSON."""

import html.parser
import io
import json
import re
import sys
from pathlib import Path

import cases
import jsonschema
import pytest
import torch
from notebooks import headings
from rich.console import Console

from bnlib.doctor import RULES, Finding, Report, diagnose
from bnlib.doctor import report as report_module
from bnlib.doctor.report import SCHEMA

ROOT = Path(__file__).parents[2]
LONG = "backbone.features.denseblock1.denselayer12.norm1"


def finding(severity="warning", layer="a.bn", rule="BN106", slug="dead-channel", **others):
    values = {
        "value": 0.625, "threshold": 0.5, "message": "Why it is so.", "fix": "model.eval()",
        "link": f"{report_module.BOOK}chapters/15-statistics-gone-wrong.html",
    }  # fmt: skip
    return Finding(rule, slug, severity, layer, **(values | others))


def report(*findings):
    return Report(list(findings), ["mode-mismatch", "dead-channel"], {"not-iid": "no loader"}, 3)


BROKEN = [
    finding("note", "", rule="BN302", slug="not-iid"),
    finding(layer=LONG),
    *(finding(layer=f"layer{i}") for i in range(7)),
    finding("error", rule="BN105", slug="non-finite-statistics", value=torch.inf, threshold=0),
]


def by_rich(report, width=80, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(report)
    return console.file.getvalue()


class TestOrder:
    def test_worst_first(self):
        assert [f.severity for f in report(*BROKEN).findings] == ["error"] + ["warning"] * 8 + [
            "note"
        ]

    def test_by_severity(self):
        found = report(*BROKEN)
        assert [len(part) for part in (found.errors, found.warnings, found.notes)] == [1, 8, 1]
        assert not found.ok
        assert report(finding("note")).ok


FORMS = {"text": str, "rich": by_rich}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
class TestText:
    def test_fits_80_columns(self, form):
        assert max(map(len, form(report(*BROKEN)).splitlines())) <= 80

    def test_counts_come_first(self, form):
        assert form(report(*BROKEN)).startswith("1 error, 8 warnings, 1 note")

    def test_a_rule_at_many_layers_is_cut_and_explained_once(self, form):
        text = form(report(*BROKEN))
        assert text.count("Why it is so.") == 3
        assert "layer3" in text
        assert "layer4" not in text
        assert "and 3 more" in text

    def test_layers_and_numbers(self, form):
        text = form(report(*BROKEN))
        for part in ("BN106 dead-channel", "0.625", "0.5", "inf", "(the model)", "layer12.no"):
            assert part in text

    def test_fix_and_page(self, form):
        text = form(report(finding()))
        assert re.search(r"fix +model\.eval\(\)", text)
        assert re.search(r"book +chapters/15-statistics-gone-wrong\.html", text)

    def test_nothing_found_says_what_was_checked(self, form):
        lines = [line.rstrip() for line in form(report()).splitlines()]
        assert lines == [
            "Nothing found.",
            "Looked at 3 batch norms; checked mode-mismatch, dead-channel.",
            "Not checked: not-iid: no loader.",
        ]

    def test_names_cannot_act_on_a_terminal(self, form):
        text = form(report(finding(layer="\x1b[31m[red]x", message="\x07[b]")))
        assert "\x1b[31m" not in text
        assert "\x07" not in text
        assert r"\x1b[31m[red]x" in text
        assert r"\x07[b]" in text


def test_rich_links_to_the_book():
    text = by_rich(report(finding()), force_terminal=True)
    assert "\x1b]8;" in text
    assert finding().link in text


class TestHtml:
    def test_is_well_formed_and_escaped(self):
        class Parser(html.parser.HTMLParser):
            def __init__(self):
                super().__init__()
                self.open, self.text = [], ""

            def handle_starttag(self, tag, attributes):
                self.open += [tag] * (tag != "br")

            def handle_endtag(self, tag):
                assert self.open.pop() == tag

            def handle_data(self, text):
                self.text += text

        parser = Parser()
        parser.feed(report(finding(layer="<b>", message="1 < 2 & 3"), *BROKEN)._repr_html_())
        assert parser.open == []
        assert "<b>" in parser.text
        assert "1 < 2 & 3" in parser.text

    def test_links_and_heads(self):
        text = report(finding())._repr_html_()
        assert f'href="{finding().link}"' in text
        assert text.count('<th scope="col">') == 6

    def test_nothing_found(self):
        text = report()._repr_html_()
        assert text.startswith("<p>Nothing found.</p><p>Looked at 3")
        assert "<table" not in text


class TestJson:
    @pytest.mark.parametrize("findings", [[], BROKEN])
    def test_keeps_its_schema(self, findings):
        content = json.loads(report(*findings).to_json())
        jsonschema.validate(content, SCHEMA)
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        assert content["counts"]["error"] == len(report(*findings).errors)

    def test_of_every_case_too(self):
        for case in cases.CASES[::6]:
            torch.manual_seed(3)
            jsonschema.validate(json.loads(diagnose(**case.make(False)).to_json()), SCHEMA)

    def test_refuses_another_shape(self):
        content = json.loads(report(*BROKEN).to_json())
        content["findings"][0]["severity"] = "fatal"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content, SCHEMA)

    def test_what_is_not_finite_is_null(self):
        assert json.loads(report(*BROKEN).to_json())["findings"][0]["value"] is None


class TestBook:
    @pytest.mark.parametrize(
        ("urls", "address"),
        [
            (["Repository, https://github.com/ada/bn.book"], "https://ada.github.io/bn.book/"),
            (["Home, https://x.org", "R, https://gitlab.com/a/b"], "https://a.gitlab.io/b/"),
            (["Repository, https://example.org/a/b"], ""),
            (None, ""),
        ],
    )
    def test_its_address_is_derived_from_the_repositorys(self, monkeypatch, urls, address):
        class Metadata:
            def get_all(self, name):
                return urls if name == "Project-URL" else None

        monkeypatch.setattr(report_module, "metadata", lambda name: Metadata())
        assert report_module._book() == address

    def test_is_unknown_where_the_package_is_not_installed(self, monkeypatch):
        def missing(name):
            raise report_module.PackageNotFoundError(name)

        monkeypatch.setattr(report_module, "metadata", missing)
        assert report_module._book() == ""

    @pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.slug)
    def test_each_rule_has_a_section(self, rule):
        page, _, anchor = rule.section.partition("#")
        chapter = ROOT / "chapters" / f"{page}.ipynb"
        if not chapter.exists():
            pytest.skip(f"{page} is not written yet")
        assert anchor in ("", *(heading.slug for heading in headings(chapter)))

    def test_a_finding_links_there(self):
        norm = cases.network()
        norm[1].eps = 0.8
        (found,) = diagnose(norm).findings
        assert found.link.startswith(f"{report_module.BOOK}chapters/14-frozen-layers.html")


def test_text_needs_no_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "dead-channel" in str(report(*BROKEN))
    assert "dead-channel" in report(*BROKEN)._repr_html_()
