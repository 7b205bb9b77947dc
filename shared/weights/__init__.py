"""Weight versions: the bits of a state (state.py), the changes between two (patches.py), the store (store.py), and the
names that a checkpoint has (checkpoint_names.py, which alone imports torch).

store = WeightStore("s3://bucket/run")
writer = store.begin(0, step=0)                                     # trainer
writer.write(FULL_FILE, blocks)
writer.finish(state_checksum=checksum)
for link in store.chain(store.versions()[-1]):                      # replica
    store.fetch(link, folder)
"""
