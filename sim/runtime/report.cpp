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
  auto resolve = [&](const Place& p) -> std::pair<const char*, uint32_t> {
    if (p.file) {
      return {keep(p.file), p.line};
    }
    if (!p.pc) {
      return {"", 0};
    }
    if (!lines) {
      lines = std::make_unique<sim::Lines>(library);
    }
    auto [file, line] = lines->find(p.pc);
    return {keep(file), line};
  };
  auto shown = [](const char* file, uint32_t line) {
    return *file ? " at " + std::string(file) + ":" + std::to_string(line)
                 : std::string();
  };
  for (const Entry& entry : entries_) {
    const Finding& f = entry.first;
    auto [file, line] = resolve(f.place);
    auto [other_file, other_line] = resolve(f.other_place);
    std::string text = std::string(kernel) + shown(file, line) + ": " + f.text +
        shown(other_file, other_line);
    if (entry.count > 1) {
      text += " (" + std::to_string(entry.count) + " times)";
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
         file,
         line,
         other_file,
         other_line,
         keep(std::move(text))});
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

} // extern "C"
