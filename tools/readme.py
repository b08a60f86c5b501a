"Write README.md from nbs/index.ipynb (`nbdev-readme` needs Quarto): markdown as it is, code cells as Python blocks"
import json,sys
from pathlib import Path

def readme(nb) -> str:
    out = []
    for c in json.loads(Path(nb).read_text('utf8'))['cells']:
        s = ''.join(c['source'])
        if c['cell_type']=='code': s = '```python\n' + '\n'.join(l for l in s.split('\n') if not l.startswith('#|')) + '\n```'
        out.append(s)
    return '<!-- Made from nbs/index.ipynb by tools/readme.py: do not edit -->\n\n' + '\n\n'.join(out) + '\n'

if __name__=='__main__':
    root = Path(__file__).resolve().parents[1]
    (root/'README.md').write_text(readme(root/'nbs'/'index.ipynb'), 'utf8')
