"""Markdown as models write it, drawn by www/markdown.js in real Chromium: whole, and
token by token, which must come to the same."""

import random

import pytest
from kit import WWW

INDEX = (WWW / "index.html").as_uri()

# What is drawn, without what is the same in every block.
RENDER = """async ([text, step, finished]) => {
  const root = document.createElement('div');
  root.className = 'text';
  document.getElementById('log').append(root);
  const markdown = new Markdown(root);
  const frame = () => new Promise(requestAnimationFrame);
  for (let at = 0; at < text.length; at += step) {
    markdown.append(text.slice(at, at + step));
    if (step < text.length) markdown.draw(Infinity);
  }
  if (finished) markdown.finish();
  if (finished) markdown.draw(Infinity);
  else await frame().then(frame);
  const copy = root.cloneNode(true);
  root.remove();
  for (const part of copy.querySelectorAll('*')) {
    part.removeAttribute('dir');
    part.classList.remove('pen');
    for (const name of ['class', 'target', 'rel', 'role', 'tabindex', 'aria-label']) {
      if (name !== 'class' || !part.className) part.removeAttribute(name);
    }
  }
  for (const button of copy.querySelectorAll('button')) button.remove();
  return copy.innerHTML;
}"""


@pytest.fixture(scope="module")
def sheet(chromium):
    context = chromium.new_context(locale="en-US")
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(INDEX)
    yield page
    context.close()
    assert problems == []


def drawn(sheet, text, step=None, finished=True):
    return sheet.evaluate(RENDER, [text, step or len(text), finished])


def code(text, language=""):
    return (
        f'<div class="code"><p class="code-head"><span>{language}</span></p>'
        f"<pre><code>{text}</code></pre></div>"
    )


def table(head, *rows):
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


BLOCKS = {
    "One\nline.\n\nTwo.": "<p>One\nline.</p><p>Two.</p>",
    "## A\n### B\n# C #\n": "<h2>A</h2><h3>B</h3><h2>C</h2>",
    "#no heading\n\n#": "<p>#no heading</p><p>#</p>",
    "a\n\n---\n***\nb": "<p>a</p><hr><hr><p>b</p>",
    "> a\n> b\nc\n\nd": "<blockquote><p>a\nb\nc</p></blockquote><p>d</p>",
    "> - a\n>   b\n>> c": "<blockquote><ul><li><p>a\nb</p></li></ul>"
    "<blockquote><p>c</p></blockquote></blockquote>",
    "```py\nif a:\n\n    b\n```\nafter": code("if a:\n\n    b", "py") + "<p>after</p>",
    "~~~\n```\n~~~": code("```"),
    "````\n```\n````": code("```"),
    "```\n<b>&\n": code("&lt;b&gt;&amp;\n"),
    "text\n```\ncode\n```": "<p>text</p>" + code("code"),
    "- a\n- b\n\n- c\n\nend": "<ul><li><p>a</p></li><li><p>b</p></li>"
    "<li><p>c</p></li></ul><p>end</p>",
    "3. a\n4. b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "- a\n  - b\n    - c\n  - d\n- e": "<ul><li><p>a</p><ul><li><p>b</p><ul><li>"
    "<p>c</p></li></ul></li><li><p>d</p></li></ul></li><li><p>e</p></li></ul>",
    "1. a\n  - b\n10. c": '<ol start="1"><li><p>a</p><ul><li><p>b</p></li></ul></li>'
    "<li><p>c</p></li></ol>",
    "* a\n\t* b": "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li></ul>",
    "- a\nlazy\n\nout": "<ul><li><p>a\nlazy</p></li></ul><p>out</p>",
    "1. a\n   ```sh\n   b\n     c\n   ```\n\n   d\n2. e": '<ol start="1"><li><p>a</p>'
    + code("b\n  c", "sh")
    + "<p>d</p></li><li><p>e</p></li></ol>",
    "In\n2024. was a year": "<p>In\n2024. was a year</p>",
    "word\n- item": "<p>word</p><ul><li><p>item</p></li></ul>",
    "| a | b |\n|---|:-:|\n| 1 | 2 \\| 3 |\n| 4 |\n\nend": table(
        '<th>a</th><th class="center">b</th>',
        '<td>1</td><td class="center">2 | 3</td>',
        '<td>4</td><td class="center"></td>',
    )
    + "<p>end</p>",
    "Text\na|b\n-|-:\n1|2": "<p>Text</p>"
    + table('<th>a</th><th class="end">b</th>', '<td>1</td><td class="end">2</td>'),
    "| no | table |\nat all": "<p>| no | table |\nat all</p>",
    "a | b\nc": "<p>a | b\nc</p>",
    "- [ ] to do": "<ul><li><p>[ ] to do</p></li></ul>",
    "-": "<ul><li></li></ul>",
    "#\tHead\n-\ta\n\n\tb\n1.\tc": "<h2>Head</h2><ul><li><p>a</p><p>b</p></li></ul>"
    '<ol start="1"><li><p>c</p></li></ol>',
    "<b>bold</b> &amp; <!-- x -->": "<p>&lt;b&gt;bold&lt;/b&gt; &amp;amp; &lt;!-- x --&gt;</p>",
}

LINK = '<a href="{}">{}</a>'
INLINE = {
    "**bold** *it* __bold__ _it_": "<strong>bold</strong> <em>it</em> "
    "<strong>bold</strong> <em>it</em>",
    "***both*** **b *i* b** *i **b** i*": "<strong><em>both</em></strong> "
    "<strong>b <em>i</em> b</strong> <em>i <strong>b</strong> i</em>",
    "**b *i*** and *i **b***": "<strong>b <em>i</em></strong> and <em>i <strong>b</strong></em>",
    "snake_case_name, 2*3*4, 2**3**4": "snake_case_name, 2*3*4, 2**3**4",
    "a * b * c, ** x **, 5*, _": "a * b * c, ** x **, 5*, _",
    "**S**erver-**S**ent": "<strong>S</strong>erver-<strong>S</strong>ent",
    "这是**重点**内容，**“引号”**也行": "这是<strong>重点</strong>内容，"
    "<strong>“引号”</strong>也行",
    "`code *x* _y_` and ``a ` b``": "<code>code *x* _y_</code> and <code>a ` b</code>",
    "**a `**` b**": "<strong>a <code>**</code> b</strong>",
    r"\*not\* \_this\_ \`nor\` 1\. \\": "*not* _this_ `nor` 1. \\",
    "unclosed **bold and `code": "unclosed **bold and `code",
    "[a *b*](https://x.example/y?z=1 'no')": "[a <em>b</em>]("
    + LINK.format("https://x.example/y?z=1", "https://x.example/y?z=1")
    + " 'no')",
    '[a *b*](https://x.example/y "title").': LINK.format("https://x.example/y", "a <em>b</em>")
    + ".",
    "[w](https://x.example/a_(b))": LINK.format("https://x.example/a_(b)", "w"),
    "[a](javascript:alert(1)) [b](data:text/html,x)": "[a](javascript:alert(1)) "
    "[b](data:text/html,x)",
    "[a](/b) [c](vbscript:d) [e]": "[a](/b) [c](vbscript:d) [e]",
    "see https://x.example/a_b_c(d), (http://y.example/).": "see "
    + LINK.format("https://x.example/a_b_c(d)", "https://x.example/a_b_c(d)")
    + ", ("
    + LINK.format("http://y.example/", "http://y.example/")
    + ").",
    "见 https://x.example/一页。后文": "见 "
    + LINK.format("https://x.example/%E4%B8%80%E9%A1%B5", "https://x.example/一页")
    + "。后文",
    "<https://x.example/>": LINK.format("https://x.example/", "https://x.example/"),
    "<https://x.example/?a=*b*> https://x.example/(*c*)": LINK.format(
        "https://x.example/?a=*b*", "https://x.example/?a=*b*"
    )
    + " "
    + LINK.format("https://x.example/(*c*)", "https://x.example/(*c*)"),
    r"[w](https://x.example/a\_b\)c)": LINK.format("https://x.example/a_b)c", "w"),
    r"\$5 and \$10, a \< b \& c": "$5 and $10, a &lt; b &amp; c",
    "![alt](https://x.example/i.png)": "!" + LINK.format("https://x.example/i.png", "alt"),
    r"\(a_1 * b_2\) and \[ x_* y_* \] $$a*b*c$$": r"\(a_1 * b_2\) and "
    r"\[ x_* y_* \] $$a*b*c$$",
    "$x_{*}$ and $*y*$ but $5 and *$6*": "$x_{*}$ and $*y*$ but $5 and <em>$6</em>",
}
CASES = BLOCKS | {text: f"<p>{wanted}</p>" for text, wanted in INLINE.items()}


@pytest.mark.parametrize("text", CASES)
def test_it_is_drawn(sheet, text):
    assert drawn(sheet, text) == CASES[text]


@pytest.mark.parametrize("step", [1, 3])
def test_however_it_is_cut(sheet, step):
    for text, wanted in CASES.items():
        assert drawn(sheet, text, step) == wanted, text


# What Markdown is made of, in any order: that is what a model may come to write.
PIECES = [
    *("a", "*", "**", "_", "`", "``", "```", "```py", "~~~", "-", ">", "#", "##"),
    *("|", "---", "***", "[", "](", "\\", "\\(", "$", "$$", "<", "&", "!", "中文", "，"),
    *("1. ", "2) ", "  ", "    ", "\t", "word ", "\n", "\n", "\n", "\n\n", "- "),
    *("| a | b |\n|---|---|\n", "https://x.example/", "http://a.example/b)"),
]


def test_any_text_is_the_same_however_it_is_cut(sheet):
    choice = random.Random(7)
    for _ in range(300):
        text = "".join(choice.choices(PIECES, k=choice.randint(1, 40)))
        whole = drawn(sheet, text)
        assert drawn(sheet, text, 1) == whole, text
        assert drawn(sheet, text, choice.randint(2, 6)) == whole, text


def test_what_is_unfinished_is_taken_for_what_it_will_be(sheet):
    begun = {
        "A **bo": "<p>A <strong>bo</strong></p>",
        "A **bold*": "<p>A <strong>bold</strong></p>",
        "A `co": "<p>A <code>co</code></p>",
        "See [the page](https://x.exa": "<p>See <a>the page</a></p>",
        "One\n\n- ": "<p>One</p>",
        "One\n\n##": "<p>One</p>",
        "One\n\n``": "<p>One</p>",
        "One\n\n```py": "<p>One</p>",
        "| a | b |\n|--": "<p></p>",
        "```py\na\n``": code("a", "py"),
        "1": "",
    }
    for text, wanted in begun.items():
        assert drawn(sheet, text, 1, finished=False) == wanted, text


LONG = {
    "paragraph": "".join(f"word{n} **b{n}** " for n in range(12_000)),
    "paragraphs": "".join(f"Par {n}.\n\n" for n in range(20_000)),
    "chinese": "长连接就是一直开着的连接。" * 15_000,
    "code": "```py\n" + "".join(f"line {n}\n\n" for n in range(15_000)) + "```\nend",
    "line": "```\n" + "x" * 200_000 + "\n```",
    "list": "".join(f"- item {n}\n  - inner `{n}`\n" for n in range(8_000)),
    "table": "| a | b |\n|---|---|\n" + "".join(f"| {n} | *x* |\n" for n in range(15_000)),
    "quote": "".join(f"> line {n}\n" for n in range(15_000)),
    "nested code": "- a\n  ```\n" + "".join(f"  line {n}\n" for n in range(15_000)) + "  ```",
    "stars": "*a " * 60_000 + "`b " * 10_000,
    "brackets": "[" * 100_000 + "](" * 50_000,
    "blank": "\n" * 100_000 + " " * 100_000,
    "fence": "```" + "x" * 200_000,
}
# How many characters each draw puts on the page, of 200 KB in pieces of 200 characters.
WORK = """(text) => {
  const root = document.createElement('div');
  document.getElementById('log').append(root);
  const markdown = new Markdown(root);
  const changes = new MutationObserver(() => {});
  changes.observe(root, { childList: true, subtree: true });
  const work = [];
  for (let at = 0; at < text.length; at += 200) {
    markdown.append(text.slice(at, at + 200));
    markdown.draw(Infinity);
    const nodes = new Set(changes.takeRecords().flatMap(({ addedNodes }) => [...addedNodes]));
    const added = [...nodes].filter((node) => !nodes.has(node.parentNode));
    work.push(added.reduce((sum, { textContent }) => sum + textContent.length, 0));
  }
  root.remove();
  return Math.max(...work);
}"""


@pytest.mark.parametrize("kind", LONG)
def test_the_work_for_a_token_does_not_grow(sheet, kind):
    assert sheet.evaluate(WORK, LONG[kind]) < 9000


def test_the_style_does_not_make_a_token_cost_as_much_as_the_page():
    """A rule like `:has(+ .x)` asks all nodes whenever one more comes."""
    assert ":has(" not in (WWW / "style.css").read_text()


def test_the_pen_stands_where_the_next_word_will(sheet):
    text = "| a | b |\n|---|---|\n| one | two |\n| thr"
    script = """(text) => {
      const root = document.createElement('div');
      const markdown = new Markdown(root);
      markdown.append(text);
      markdown.draw(Infinity);
      return [...root.querySelectorAll('.pen')].map((pen) => pen.textContent);
    }"""
    assert sheet.evaluate(script, text) == ["thr"]
    assert sheet.evaluate(script, text + "ee | fo") == ["fo"]
    assert sheet.evaluate(script, "- a\n  - b **c") == ["b c"]
    assert sheet.evaluate(script, "```py\ncode") == ["code"]
