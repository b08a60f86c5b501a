"""The built site and the report of a search, as a browser sees them: `python tools/docs.py && pytest tests/docs`; not a part of the usual run, because it needs
Chromium (`apt-get install chromium`, or `playwright install chromium`)"""
import functools,http.server,shutil,subprocess,sys,threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote,urlsplit
import pytest
from playwright.sync_api import sync_playwright
from hba_fastai.all import PBASpace,Schedule
from hba_fastai.cli import hba_show

SITE = Path(__file__).parents[2]/'_docs'
PAGES = sorted(f.name for f in SITE.glob('*.html') if f.name!='404.html') # which GitHub serves from any depth
WIDTHS = 390,1280

class Tags(HTMLParser):
    "Tags of a page with their attributes"
    def __init__(self, f):
        super().__init__()
        self.found = []
        self.feed(f.read_text('utf8'))
    def handle_starttag(self, tag, attrs): self.found.append((tag,dict(attrs)))
    def all(self, attr): return [(tag,a[attr]) for tag,a in self.found if a.get(attr)]

@functools.cache
def tags(name): return Tags(SITE/name)

@functools.cache
def anchors(name): return {v for attr in ('id','name') for _,v in tags(name).all(attr)}

@pytest.fixture(scope='module')
def url():
    "The site, served on this machine"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1',0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()

@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as p:
        own = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        yield own
        own.close()

@pytest.fixture
def tab(browser, url):
    "A tab that notes what goes wrong in it: errors, and requests that fail or leave the site"
    tab = browser.new_page(viewport=dict(width=1280, height=900))
    tab.wrong = []
    tab.on('console', lambda m: m.type=='error' and tab.wrong.append(m.text))
    tab.on('pageerror', lambda e: tab.wrong.append(str(e)))
    tab.on('requestfailed', lambda r: tab.wrong.append(f'failed: {r.url}'))
    tab.on('request', lambda r: r.url.startswith((url,'data:','blob:','file:')) or tab.wrong.append(f'leaves the site: {r.url}'))
    yield tab
    assert tab.wrong==[]
    tab.close()

def is_light(tab): return tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]>127")

def test_the_site_is_built(): assert len(PAGES)>50, 'run `python tools/docs.py` first'

@pytest.mark.parametrize('name', PAGES)
def test_links_and_anchors_lead_somewhere(name):
    dead = []
    for tag,link in tags(name).all('href')+tags(name).all('src'):
        to = urlsplit(link)
        if to.scheme or to.netloc: continue
        page = unquote(to.path) or name
        if not (SITE/page).exists(): dead.append(link)
        elif tag=='a' and to.fragment and unquote(to.fragment) not in anchors(page): dead.append(link)
    assert dead==[]

@pytest.mark.parametrize('name', PAGES)
def test_nothing_is_fetched_from_elsewhere(name):
    fetched = [(tag,a) for tag,a in tags(name).found if tag in ('script','img','iframe','source') or tag=='link' and a.get('rel')!='canonical']
    assert [a for _,a in fetched if (a.get('src') or a.get('href') or '').startswith(('http','//'))]==[]

@pytest.mark.parametrize('name', PAGES)
def test_a_page_is_whole_and_fits(name, tab, url):
    "No error, all pictures there, and no scrolling sideways on a telephone or on a desk, by day and by night"
    tab.goto(url+name, wait_until='networkidle')
    tab.evaluate("document.querySelectorAll('img').forEach(o => o.loading = 'eager')")
    assert tab.evaluate("[...document.images].filter(o => !(o.complete && o.naturalWidth)).map(o => o.src.slice(0, 80))")==[]
    for width in WIDTHS:
        tab.set_viewport_size(dict(width=width, height=900))
        assert tab.evaluate('document.documentElement.scrollWidth')<=width
    tab.evaluate("document.querySelectorAll('article :not(pre) > code').forEach(o => o.remove())") # where `OPS[name](x)` is no dead link
    assert '](' not in tab.evaluate("[...document.querySelectorAll('article p, article li, article td, article h3')].map(o => o.innerText).join()")
    assert is_light(tab)
    tab.emulate_media(color_scheme='dark')
    tab.wait_for_timeout(400) # it fades
    assert not is_light(tab)

def test_search_finds_a_page(tab, url):
    tab.goto(url+'index.html', wait_until='networkidle')
    tab.click('input[name=query]')
    tab.locator('input[name=query]').press_sequentially('hypergradient') # it listens to keys
    tab.wait_for_selector('.md-search-result__link')
    tab.click('.md-search-result__link >> nth=0')
    tab.wait_for_url('**/*.html*')
    assert 'hypergradient' in tab.inner_text('article').lower()

@pytest.mark.parametrize('width', WIDTHS)
def test_navigation_leads_to_a_page(width, tab, url):
    tab.set_viewport_size(dict(width=width, height=900))
    tab.goto(url+'index.html', wait_until='networkidle')
    if width<500: tab.click('label.md-header__button[for=__drawer]')
    tab.click('nav.md-nav--primary >> text=My data look different')
    tab.wait_for_url('**/other_camera.html')
    assert tab.inner_text('h1').startswith('My data look different')

def test_the_slider_moves(tab, url):
    tab.goto(url+'how_it_works.html', wait_until='networkidle')
    src = lambda: tab.get_attribute('.slider img', 'src')
    first = src()
    tab.fill('.slider input', '19')
    assert src()!=first and tab.inner_text('.slider output')=='100%'

# --- the report of a search

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "Where the last lines of `hba_search` say that the report is"
    run = [sys.executable,'-c','from hba_fastai.cli import hba_search; hba_search()','--epochs','4']
    folder = tmp_path_factory.mktemp('search')
    said = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True).stdout
    return folder/next(line for line in said.splitlines() if line.startswith('Report:')).split()[1]

@pytest.mark.parametrize('width', WIDTHS)
def test_the_report_of_a_search_opens(width, tab, report):
    tab.set_viewport_size(dict(width=width, height=900))
    file = report.as_uri()
    tab.on('request', lambda r: r.url.startswith((file,'data:')) or tab.wrong.append(f'asks for {r.url}'))
    tab.goto(file, wait_until='networkidle')
    assert 'Contrast' in tab.inner_text('body') and tab.locator('img').count()>=3
    assert tab.evaluate("[...document.images].filter(o => !o.naturalWidth).length")==0
    assert tab.evaluate('document.documentElement.scrollWidth')<=width

def test_what_a_stranger_wrote_is_text(tab, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    space = PBASpace()
    Schedule([0.], space.values(space.start())[None], provenance={evil: evil}).save(tmp_path/'s.json')
    hba_show.__wrapped__(tmp_path/'s.json', html=tmp_path/'s.html')
    tab.on('dialog', lambda d: (tab.wrong.append(d.message), d.dismiss()))
    tab.goto((tmp_path/'s.html').as_uri(), wait_until='networkidle')
    assert tab.text_content('body').count(evil)>=2 and tab.locator('script').count()==0
