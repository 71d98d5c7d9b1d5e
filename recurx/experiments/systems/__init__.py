"""What `recurx.patch` needs to know of systems beside TRM and HRM, one class a code base.

Each is an entry point of the group "recurx.adapters" (pyproject.toml); other packages bring their
own the same way, see `recurx.patching.adapter.Adapter`.

eqr_and_urm.py   EqR (damping and noise), URM (one state, convolutions)
rsm_and_sic.py   RSM and SIC, whose recursion lies in other methods
fprm.py          FPRM, whose solver stays its own around the layers
nano_trm.py      nano-trm, TRM under other names
lucidrains.py    TinyRecursiveModel, the loop around any network
usual_nets.py    the networks that it is used with: MLPMixer1D, x-transformers' Encoder and Decoder
foreign.py       networks of other layouts as nets: read, proved, watched
"""
