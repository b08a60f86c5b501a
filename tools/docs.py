"""Build the documentation: `python tools/docs.py` makes `_docs/` from the notebooks, and fetches nothing

nbdev runs what the pages of modules need for their signatures and drops hidden cells; nbconvert writes markdown and pictures;
MkDocs makes the site that `mkdocs.yml` describes. A link or an anchor that leads nowhere is an error. It needs `pip install -e '.[docs]'`."""
import os,re,shutil,subprocess,sys
from pathlib import Path
import nbformat,yaml
from jinja2 import DictLoader
from nbconvert import MarkdownExporter
from nbdev.doclinks import NbdevLookup
from nbdev.serve import proc_nbs
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
PAGES,SITE = ROOT/'_proc'/'pages',ROOT/'_docs'
URL,FILES = 'https://hba-fastai.github.io/hba-fastai/','https://github.com/hba-fastai/hba-fastai/blob/main/'

# --- from a notebook to markdown
OUTPUTS = """{%- extends 'markdown/index.md.j2' -%}
{% macro printed(text) %}
``` {.text .output}
{{ text | trim('\n') }}
```
{% endmacro %}
{% block stream %}{{ printed(output.text) }}{% endblock %}
{% block data_text %}{{ printed(output.data['text/plain']) }}{% endblock %}"""

def exporter() -> MarkdownExporter:
    "Markdown in which outputs are marked as such, without the input of cells that are only there for their output"
    hide = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['silent']))
    return MarkdownExporter(config=hide, extra_loaders=[DictLoader({'outputs.md.j2': OUTPUTS})], template_file='outputs.md.j2')

def clean(nb):
    "`nb` without what nbdev leaves in cells for itself, and that nbformat refuses"
    nb.metadata = {'language_info': {'name': 'python'}}
    nb.cells = [c for c in nb.cells if not c.source.startswith('<!-- WARNING')]
    for c in nb.cells:
        c.pop('has_sd', None)
        c.metadata = {'tags': ['silent']} if re.search(r'^#\| ?echo: ?false', c.source, re.M) else {}
        if c.cell_type!='code': continue
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
        for o in c.outputs: o.pop('metadata', None) if o.output_type=='stream' else o.update(metadata={})
    return nb

def tables(md:str) -> str:
    "The tables of pandas look like the others, the name of their index in the corner"
    md = re.sub(r'<style scoped>.*?</style>', '', md, flags=re.S)
    md = re.sub(r'<table [^>]*class="dataframe"[^>]*>', '<table>', md).replace(' style="text-align: right;"', '')
    return re.sub(r'<th></th>((?:\s*<th>[^<]*</th>)*\s*</tr>)\s*<tr>\s*<th>([^<]+)</th>(?:\s*<th></th>)*\s*</tr>', r'<th>\2</th>\1', md)

def signatures(md:str) -> str:
    "Headings of `show_doc` have the anchors by which nbdev refers to them, and a quiet link to the source"
    head = lambda m: m[0].replace('_', r'\_') if '__' in m[1] else f'{m[0]} {{#{m[1].lower()}}}' # __x__ would be bold
    md = re.sub(r'^### ([A-Za-z_][\w.]*)$', head, md, flags=re.M)
    return re.sub(r'^\[source\]\(([^)]*)\)\{.*\}$', r'[source](\1){.source}', md, flags=re.M)

# --- links
def page_name(nb:Path) -> str: return re.sub(r'^\d[0-9a-z]*_', '', nb.stem)

def public(nbs) -> NbdevLookup:
    "Where the names of `hba_fastai.all` and their methods are documented: other names in backquotes are too often words of everyday"
    import hba_fastai.all as names
    lookup,shown = NbdevLookup(strip_libs='hba_fastai'),{o for nb in nbs for o in re.findall(r'"### ([\w.]+)\\n', nb.read_text('utf8'))}
    lookup.syms = {k:v for k,v in lookup.syms.items() if k in shown and '__' not in k and k.split('.')[0] in names.__all__}
    return lookup

def modules(md:str, names) -> str:
    "The last column of a table names modules: link them"
    link = lambda m: f'[`{m[1]}`]({m[1]}.md)' if m[1] in names else m[0]
    return re.sub(r'^\|.*', lambda row: re.sub(r'`(\w+)`', link, row[0]), md, flags=re.M)

def relative(md:str) -> str:
    "Links between pages, whether a notebook or an address of the site is named; and to the files that figures come from"
    md = re.sub(r'(?<!\[)`(benchmarks/[\w/]+\.\w+)`', rf'[`\1`]({FILES}\1)', md)
    md = re.sub(r'\]\((?:\d[0-9a-z]*_)?(\w+)\.(?:ipynb|html)(#[^)]*)?\)', r'](\1.md\2)', md)
    md = re.sub(r'\[\[(`[^`]+`)\]\([^)]*\)\]\(', r'[\1](', md) # a name that was a link already
    return re.sub(rf'\]\({URL}(\w+)\.html(#[^)]*)?\)', r'](\1.md\2)', md)

# --- pages
def write_page(nb:Path, convert:MarkdownExporter, lookup:NbdevLookup, names):
    "Write the page of a notebook that nbdev has processed, with its pictures"
    name,d = page_name(nb),clean(nbformat.v4.reads(nb.read_text('utf8')))
    front = yaml.safe_load(d.cells.pop(0).source.strip().strip('-'))
    head = {k: front[k] for k in ('title','description') if k in front}
    body,found = convert.from_notebook_node(d, {'unique_key': name, 'output_files_dir': 'pictures'})
    body = relative(lookup.linkify(signatures(tables(body))))
    if name=='index': body = modules(body, names)
    lead = f"> {head['description']}\n\n" if 'description' in head else ''
    (PAGES/f'{name}.md').write_text(f"---\n{yaml.safe_dump(head, allow_unicode=True)}---\n\n# {front['title']}\n\n{lead}{body}\n", 'utf8')
    for f,data in found['outputs'].items():
        (PAGES/f).parent.mkdir(exist_ok=True)
        (PAGES/f).write_bytes(data)

def write_pages(nbs:Path):
    "All pages, from notebooks that nbdev has processed"
    if PAGES.exists(): shutil.rmtree(PAGES)
    PAGES.mkdir(parents=True)
    nbs = sorted(nbs.glob('*.ipynb'))
    convert,lookup,names = exporter(),public(nbs),{page_name(o) for o in nbs}
    for nb in nbs: write_page(nb, convert, lookup, names)
    shutil.copy(ROOT/'CHANGELOG.md', PAGES/'changelog.md')
    for f in ('docs.css','schedule.schema.json'): shutil.copy(ROOT/'tools'/f, PAGES/f)

def build():
    "`_docs/`, from all notebooks"
    write_pages(proc_nbs(n_workers=0))
    subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--clean'], cwd=ROOT, check=True,
                   env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
    for f in PAGES.glob('*.md'): # docstrings of the modules name these
        (SITE/f'{f.stem}.html.md').write_text(re.sub(r'\]\((\w+)\.md', r'](\1.html.md', f.read_text('utf8')), 'utf8')
    print(f'{SITE/"index.html"}: {len(list(SITE.glob("*.html")))} pages')

if __name__=='__main__': build()
