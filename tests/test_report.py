"`hba_show` as people start it: a table of 80 columns, a page that needs nothing else, strangers' files, refusals in one sentence"
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
import pytest
from fastcore.script import CliError
from hba_fastai.cli import hba_show
from hba_fastai.schedule import Schedule
from hba_fastai.space import TABLE7,PBASpace,Space
from conftest import write_images

pytestmark = pytest.mark.filterwarnings('ignore')
EVIL = '<script>alert(1)</script><img src=x onerror=alert(1)>'

class Elements(HTMLParser):
    "Names of the elements of a page, and the addresses in it"
    def __init__(self, page):
        super().__init__()
        self.tags,self.links = [],[]
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k,v in attrs if k in ('src','href') or k.startswith('on')]

def saved(tmp_path, spaces=None, name='s.json'):
    space = sum((spaces or {'PBAPolicy': PBASpace()}).values(), Space())
    return str(Schedule([0.,1.], space.values(space.start())[None].repeat(2, 1), provenance={EVIL: EVIL}, spaces=spaces).save(tmp_path/name))

def test_a_table_in_the_terminal(tmp_path, capsys):
    hba_show(saved(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines))<=80 and sum(l.startswith('Rotate ') for l in lines)==1 and 'NaN' not in ''.join(lines)

def test_a_table_of_what_there_is(tmp_path, capsys):
    "Without probabilities; without any operation"
    hba_show(saved(tmp_path, {'Noise': Space(noise=(0,0.2))}))
    row, = [l for l in capsys.readouterr().out.splitlines() if l.startswith('noise')]
    assert 'nan' not in row and 'None' not in row and '-' in row.split()
    space = PBASpace()
    s = Schedule([0.,1.], space.values(space.start())[None].repeat(2, 1), skip=[*TABLE7])
    hba_show(str(s.save(tmp_path/'none.json')), html=str(tmp_path/'p.html'))
    out = capsys.readouterr().out
    assert len(s.skip)==15 and 'Not applied: ' in out and 'Empty' not in out and max(map(len, out.split('\nPage')[0].splitlines()))<=80

def test_a_page_of_a_strangers_file(tmp_path):
    "What a file says is text, and nothing is fetched"
    page = tmp_path/'new'/'page.html'
    hba_show(saved(tmp_path, name='<b>.json'), html=str(page))
    found = Elements(page.read_text('utf8'))
    assert not {'script','b','link','iframe'} & {*found.tags} and found.tags.count('img')==1
    assert all(l.startswith('data:image/png') for l in found.links)

def test_a_strangers_file_does_not_steer_the_terminal(tmp_path, capsys):
    space = PBASpace()
    Schedule([0.], space.values(space.start())[None], provenance=dict(model='\x1b[2J\x1b]0;title\x07')).save(tmp_path/'s.json')
    hba_show(str(tmp_path/'s.json'))
    out = capsys.readouterr().out
    assert 'model' in out and out.replace('\n', '').isprintable()

def test_with_images(tmp_path, pngs):
    hba_show(saved(tmp_path), html=str(tmp_path/'p.html'), images=str(pngs), size=16)
    assert Elements((tmp_path/'p.html').read_text('utf8')).tags.count('img')==2

def test_of_another_policy(tmp_path, pngs, capsys):
    f = saved(tmp_path, {'Noise': Space(noise=(0,0.2))})
    hba_show(f, html=str(tmp_path/'p.html'))
    assert 'noise' in capsys.readouterr().out
    with pytest.raises(CliError, match='Noise'): hba_show(f, html=str(tmp_path/'q.html'), images=str(pngs), size=16)

def test_a_pipe_that_closes_is_no_fault_of_the_schedule(tmp_path):
    with mock.patch('builtins.print', side_effect=BrokenPipeError), pytest.raises(BrokenPipeError): hba_show(saved(tmp_path))

def test_refused(tmp_path, pngs):
    f = saved(tmp_path)
    (tmp_path/'odd.json').write_text('{}')
    write_images(tmp_path/'few', 4)
    (tmp_path/'few'/'a'/'cut.png').write_bytes(b'')
    before = Path(f).read_bytes()
    for a,kw,match in (('nowhere.json', {}, 'cannot be read'), (str(tmp_path), {}, 'cannot be read'), (f'{tmp_path}/odd.json', {}, 'format'),
                       (f, dict(images=str(pngs)), 'add --html'), (f, dict(html=str(tmp_path)), 'is a folder'),
                       (f, dict(html=f'{tmp_path}/p.html', images='nowhere'), 'is no folder'),
                       (f, dict(html=f'{tmp_path}/p.html', images=f'{tmp_path}/few'), r'cut\.png'), (f, dict(html=f), 'would replace it')):
        with pytest.raises(CliError, match=match) as e: hba_show(a, **kw)
        assert len(str(e.value).splitlines())==1
    assert Path(f).read_bytes()==before
