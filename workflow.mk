# The experiment's targets. ACTIVE may hold what activates an environment for a command; without it
# permafrost and dvc are those that are found on PATH.

.DEFAULT_GOAL := help
.PHONY: help repro ui

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

repro: ## run the whole experiment, print its tables and where its page lies
	@$(ACTIVE) permafrost doctor --repair --notes
	@$(ACTIVE) permafrost check
	@$(ACTIVE) dvc repro || { code=$$?; $(ACTIVE) permafrost track; exit $$code; }
	@$(ACTIVE) permafrost tables
	-@$(ACTIVE) permafrost track
	@echo "The page: file://$(CURDIR)/reports/index.html"

ui: ## compare the runs in MLflow
	@$(ACTIVE) permafrost ui
