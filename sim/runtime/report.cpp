#include "report.h"

#include "lines.h"

using sim::Finding;
using sim::Place;

void sim_report::add(const Finding& f) {
  std::lock_guard lock(mutex_);
  auto id = [](const Place& p) { return p.pc ? p.pc : uintptr_t(p.file); };
  Key key{
      f.kind,
      f.buffer,
      id(f.place),
      f.place.line,
      id(f.other_place),
      f.other_place.line};
  auto [at, added] = index_.try_emplace(key, entries_.size());
  if (added) {
    entries_.push_back({f, 0});
  }
  entries_[at->second].count++;
}

void sim_report::fail(const std::string& message) {
  std::lock_guard lock(mutex_);
  if (error.empty()) {
    error = message;
  }
}

bool sim_report::failed() {
  std::lock_guard lock(mutex_);
  return !error.empty();
}

const char* sim_report::keep(std::string text) {
  strings_.push_back(std::make_unique<std::string>(std::move(text)));
  return strings_.back()->c_str();
}

void sim_report::close(const char* kernel, const std::string& library) {
  std::unique_ptr<sim::Lines> lines;
  auto resolve = [&](const Place& p) -> std::pair<std::string, uint32_t> {
    if (p.file || !p.pc) {
      return {p.file ? p.file : "", p.line};
    }
    if (!lines) {
      lines = std::make_unique<sim::Lines>(library);
    }
    return lines->find(p.pc);
  };
  auto shown = [](const std::string& file, uint32_t line) {
    return file.empty() ? "" : " at " + file + ":" + std::to_string(line);
  };
  // One line of a source may be several places in the code.
  std::map<std::string, size_t> seen;
  for (const Entry& entry : entries_) {
    const Finding& f = entry.first;
    auto [file, line] = resolve(f.place);
    auto [other_file, other_line] = resolve(f.other_place);
    std::string here = shown(file, line), there = shown(other_file, other_line);
    std::string key =
        std::to_string(f.kind) + here + there + " " + std::to_string(f.buffer);
    auto [at, added] = seen.try_emplace(key, findings.size());
    if (!added) {
      findings[at->second].count += entry.count;
      continue;
    }
    findings.push_back(
        {f.kind,
         f.buffer,
         f.offset,
         entry.count,
         f.threadgroup,
         f.thread,
         f.other_threadgroup,
         f.other_thread,
         keep(file),
         line,
         keep(other_file),
         other_line,
         keep(kernel + here + ": " + f.text + there)});
  }
  for (sim_finding& f : findings) {
    if (f.count > 1) {
      f.text = keep(f.text + (" (" + std::to_string(f.count) + " times)"));
    }
  }
}

extern "C" {

const char* sim_report_error(const sim_report* report) {
  return report->error.empty() ? nullptr : report->error.c_str();
}

const sim_finding* sim_report_findings(const sim_report* r, size_t* count) {
  *count = r->findings.size();
  return r->findings.data();
}

const sim_traffic* sim_report_traffic(const sim_report* r, size_t* count) {
  *count = r->traffic.size();
  return r->traffic.data();
}

const sim_counts* sim_report_counts(const sim_report* report) {
  return &report->counts;
}

void sim_report_free(sim_report* report) {
  delete report;
}

}  // extern "C"
