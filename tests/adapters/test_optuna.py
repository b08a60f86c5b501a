"The page on grid and random search, run with Optuna"
import json
from pathlib import Path
import pytest
pytest.importorskip('optuna', minversion='5', reason="needs the extra `search`")

def test_the_page():
    nb = json.loads((Path(__file__).parents[2]/'nbs/12i_optuna.ipynb').read_text('utf8'))
    cells = [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']
    assert sum('optuna' in c for c in cells)>=3
    of_page = {}
    for c in cells: exec(c, of_page)
    assert of_page['study'].best_value<2.6 and {t.state.name for t in of_page['study'].trials}<={'COMPLETE','PRUNED'}
