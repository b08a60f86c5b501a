"What pip needs to know, from settings.ini; the version is that of the package"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here/'settings.ini', encoding='utf8')
cfg = config['DEFAULT']
version = re.search(r"__version__ = ['\"](.+?)['\"]", (here/'hba_fastai/__init__.py').read_text('utf8')).group(1)

setup(name=cfg['lib_name'], version=version, description=cfg['description'], keywords=cfg['keywords'].split(), author=cfg['author'], license='Apache-2.0',
      long_description=(here/'README.md').read_text('utf8'), long_description_content_type='text/markdown',
      packages=['hba_fastai'], package_data={'hba_fastai': ['py.typed']}, python_requires=f">={cfg['min_python']}",
      install_requires=cfg['requirements'].split(),
      extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev','bench','adapters','search','ray','docs')},
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"hba_fastai=hba_fastai._modidx:d"]})
